// What both passes over the experts share: the plan as plain arrays, the tasks it falls into, and rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "pool.h"
#include "tasks.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gatewright {

// The tensors of a call, in the order of the operators' arguments.
struct Inputs {
  at::Tensor x, combine_weights, w_in, w_down;
  std::optional<at::Tensor> b_in, b_down, hidden_scale;
  at::Tensor token_ids, counts, slots;
  bool weigh_input;
};

// Sizes as design.md letters them; H is the first matrix' rows, M counts rows that belong to an expert.
struct Sizes {
  int64_t T, D, H, F, E, K, M;
};

// Raises where shapes, dtypes or indices do not fit; after it, no pointer below leaves its tensor.
// `quantised`: int8 weights are taken, too.
Sizes check(const Inputs& inputs, bool gated, bool quantised = false);

using Maybe = std::optional<at::Tensor>;

// Raises unless int8 weights, and they alone, have an fp32 scale for each of their rows.
void check_scales(const Inputs& inputs, const Maybe& scale_in, const Maybe& scale_down, const Sizes& sizes);

// Gradients of a call's tensors; undefined where not asked for.
struct Gradients {
  at::Tensor x, combine_weights, w_in, w_down, b_in, b_down;
};

// The experts' output and, with `keep`, their pre-activations (else no rows of them); and all gradients.
std::tuple<at::Tensor, at::Tensor> forward_of(const Inputs& inputs, c10::string_view activation, bool keep);
Gradients backward_of(const Inputs& inputs, const at::Tensor& grad_y, const at::Tensor& pre, bool need_x,
                      bool need_weights, c10::string_view activation);

// Consecutive rows of one expert.
struct Task {
  int64_t expert, begin, end, part;  // `part` counts an expert's tasks
};

// Cuts every expert's rows into tasks of at most `most` rows, the largest first. The cut depends on the counts
// alone, never on threads, so that sums over tasks are always taken alike.
std::vector<Task> tasks_of(const at::Tensor& counts, int64_t most);

// Rows worked on at a time, at most: few enough for the caches, enough to be worth reading the weights for.
constexpr int64_t kPanel = 128;

// Rows of each panel of a task: as few panels as `most` allows, all of one size in whole steps of 8.
inline int64_t even_panels(int64_t rows, int64_t most) {
  const int64_t panels = (rows + most - 1) / most;
  return round_up((rows + panels - 1) / panels, 8);
}

// Each row's combine weight, [M].
void weights_of_rows(const Inputs& inputs, const Sizes& sizes, float* out);

// y[t] = sum_k rows[slots[t, k]], in fp32; what was dropped adds nothing.
template <class T>
void gather_sum(const T* rows, const at::Tensor& slots, const Sizes& sizes, T* y);

// A thread's buffers, one behind another in one block.
class Layout {
 public:
  // Reserves room for `count` values and returns where it begins.
  template <class V>
  size_t add(int64_t count) {
    size_t place = size_;
    size_ += (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(V) + 63) / 64 * 64;
    return place;
  }
  // Room of one thread, apart from the next one's by an odd number of lines: equal places would share cache sets.
  size_t size() const { return size_ + 64 * 17; }

 private:
  size_t size_ = 0;
};

inline float weight_or_one(const float* weights, int64_t row, bool used) { return used ? weights[row] : 1.0f; }

// Copies a row into a buffer of `padded` numbers, times `scale`.
template <class T>
inline void take_row(const T* from, int64_t n, float scale, T* to, int64_t padded) {
  if (scale == 1.0f) {
    std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = narrow<T>(widen(from[j]) * scale);
  }
  for (int64_t j = n; j < padded; ++j) to[j] = narrow<T>(0.0f);
}

// Stores a row that nobody reads soon, past the caches where it fills whole lines of them.
template <class T>
inline void stream_row(const float* from, int64_t n, T* to) {
#if defined(__AVX512F__)
  constexpr int64_t line = 64 / sizeof(T);
  if (n % line == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (int64_t j = 0; j < n; j += line) {
      alignas(64) T numbers[line];
      for (int64_t i = 0; i < line; ++i) numbers[i] = narrow<T>(from[j + i]);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + j), _mm512_load_si512(numbers));
    }
    return;
  }
#endif
  for (int64_t j = 0; j < n; ++j) to[j] = narrow<T>(from[j]);
}

// Makes streamed rows visible to other threads.
inline void end_of_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <class T>
inline void clear_rows(T* rows, int64_t ld, int64_t begin, int64_t end) {
  if (end > begin) std::memset(static_cast<void*>(rows + begin * ld), 0, (end - begin) * ld * sizeof(T));
}

template <class T>
inline T* data(const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }
template <class T>
inline const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Calls body<T, W>() for the dtypes of the activations and of the weights.
template <class Body>
void with_dtypes(at::ScalarType rows, at::ScalarType weights, Body&& body) {
  if (rows == at::kFloat) return body.template operator()<float, float>();
  if (weights == at::kFloat) return body.template operator()<bf16, float>();
  body.template operator()<bf16, bf16>();
}

}  // namespace gatewright
