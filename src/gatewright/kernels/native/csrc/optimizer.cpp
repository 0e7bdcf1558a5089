// The norm of all gradients, and AdamW with clipping, narrowing and averaging in one pass over the weights
// (kernels/adamw.py has the definition).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"
#include "tasks.h"

namespace gatewright {
namespace {

using Tensors = at::TensorList;

// Tensors are cut by size alone, so that sums do not depend on threads.
constexpr int64_t kPiece = 1 << 14;
constexpr int64_t kLanes = 64;

struct Piece {
  int64_t tensor, begin, end, slice;  // slice: its place in `idle`, or -1
};

void check_floats(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.device().is_cpu(),
                    "the native optimizer takes contiguous fp32 tensors of the CPU");
}

double squares(const float* x, int64_t size) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const double wide = x[i + j];
      lanes[j] += wide * wide;
    }
  for (int64_t j = 0; i + j < size; ++j) lanes[j] += static_cast<double>(x[i + j]) * x[i + j];
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

at::Tensor gradient_norm(Tensors gradients) {
  std::vector<Piece> pieces;
  std::vector<const float*> from;
  for (const at::Tensor& gradient : gradients) {
    check_floats(gradient);
    const int64_t tensor = static_cast<int64_t>(from.size()), size = gradient.numel();
    from.push_back(gradient.const_data_ptr<float>());
    for (int64_t at = 0; at < size; at += kPiece) pieces.push_back({tensor, at, std::min(size, at + kPiece), -1});
  }
  const int64_t many = static_cast<int64_t>(pieces.size());
  std::vector<double> sums(many);
  run_tasks(many, threads_for(many), [&](int64_t task, int) {
    const Piece& piece = pieces[task];
    sums[task] = squares(from[piece.tensor] + piece.begin, piece.end - piece.begin);
  });
  double total = 0.0;
  for (double sum : sums) total += sum;
  at::Tensor norm = at::empty({}, at::TensorOptions().dtype(at::kFloat));
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

struct Rates {
  float decayed, beta1, beta2, eps, scale, toward;
};

// Of one tensor at its step: the size of a step, and what sqrt(v) is multiplied by.
struct Corrected {
  float size, root;
};

struct Place {
  float *weight, *first, *second, *average;
  uint16_t* narrowed;
  const float* gradient;
  Corrected corrected;
};

// a + t (b - a), from the nearer end, as torch.lerp.
inline float between(float a, float b, float t) {
  return t < 0.5f ? std::fma(t, b - a, a) : std::fma(b - a, t - 1.0f, b);
}

template <bool averaging, bool narrowing>
void update(const Place& at, const Rates& r, int64_t begin, int64_t end) {
  float *__restrict weight = at.weight, *__restrict first = at.first, *__restrict second = at.second;
  float* __restrict average = at.average;
  uint16_t* __restrict narrowed = at.narrowed;
  const float* __restrict gradient = at.gradient;
  const Rates rates = r;  // a copy, which no store through the pointers can change
  const float rest1 = 1.0f - rates.beta1, rest2 = 1.0f - rates.beta2;
  const float size = at.corrected.size, root = at.corrected.root;
  // Said twice: among so many pointers the compiler gives up on finding out that none is another.
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const float g = gradient[i] * rates.scale;
    const float m = between(first[i], g, rest1);
    const float v = std::fma(rest2 * g, g, rates.beta2 * second[i]);
    const float w = std::fma(-size, m / std::fma(std::sqrt(v), root, rates.eps), weight[i] * rates.decayed);
    first[i] = m, second[i] = v, weight[i] = w;
    if constexpr (averaging) average[i] = between(average[i], w, rates.toward);
    if constexpr (narrowing) narrowed[i] = to_bf16(w);
  }
}

void update(const Place& at, const Rates& rates, const Piece& piece) {
  if (at.average != nullptr && at.narrowed != nullptr) return update<true, true>(at, rates, piece.begin, piece.end);
  if (at.average != nullptr) return update<true, false>(at, rates, piece.begin, piece.end);
  if (at.narrowed != nullptr) return update<false, true>(at, rates, piece.begin, piece.end);
  update<false, false>(at, rates, piece.begin, piece.end);
}

// What an idle expert's slice still gets: its average moves towards the weights, which stay.
void rest(const Place& at, const Rates& rates, const Piece& piece) {
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    if (at.average != nullptr) at.average[i] = between(at.average[i], at.weight[i], rates.toward);
    if (at.narrowed != nullptr) at.narrowed[i] = to_bf16(at.weight[i]);
  }
}

void check_sizes(Tensors weights, Tensors others, bool optional) {
  if (optional && others.empty()) return;
  TORCH_CHECK_VALUE(others.size() == weights.size(), "adamw: ", others.size(), " tensors for ", weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    TORCH_CHECK_VALUE(others[i].sizes() == weights[i].sizes(), "adamw: shapes do not fit");
}

// Cuts tensor number `tensor` into pieces; with `slices` none reaches over the border of a slice.
void cut(const at::Tensor& weight, int64_t tensor, int64_t slices, std::vector<Piece>& pieces, std::vector<Piece>& whole) {
  TORCH_CHECK_VALUE(slices >= 0 && (slices == 0 || weight.numel() % slices == 0), "adamw: ", slices, " slices of ",
                    weight.numel());
  const int64_t each = slices > 0 ? weight.numel() / slices : weight.numel();
  for (int64_t slice = 0; slice < std::max<int64_t>(slices, 1) && each > 0; ++slice) {
    const int64_t begin = slice * each, end = begin + each;
    const int64_t place = slices > 0 ? static_cast<int64_t>(whole.size()) : -1;
    if (slices > 0) whole.push_back({tensor, begin, end, place});
    for (int64_t at = begin; at < end; at += kPiece) pieces.push_back({tensor, at, std::min(end, at + kPiece), place});
  }
}

void adamw(Tensors weights, Tensors gradients, Tensors first, Tensors second, Tensors steps, Tensors averages,
           Tensors narrowed, at::IntArrayRef slices, double rate, double beta1, double beta2, double eps, double decay,
           double scale, double toward) {
  for (Tensors each : {gradients, first, second}) check_sizes(weights, each, false);
  for (Tensors each : {averages, narrowed}) check_sizes(weights, each, true);
  TORCH_CHECK_VALUE(steps.size() == weights.size() && slices.size() == weights.size(), "adamw: lists of other lengths");
  for (Tensors each : {weights, gradients, first, second, averages})
    for (const at::Tensor& one : each) check_floats(one);
  for (const at::Tensor& one : narrowed)
    TORCH_CHECK_VALUE(one.scalar_type() == at::kBFloat16 && one.is_contiguous() && one.device().is_cpu(),
                      "adamw: narrowed weights are contiguous bf16 tensors of the CPU");
  for (const at::Tensor& one : steps) {
    check_floats(one);
    TORCH_CHECK_VALUE(one.numel() == 1, "adamw: a step is one number");
  }
  std::vector<Piece> pieces, whole;
  for (size_t i = 0; i < weights.size(); ++i) cut(weights[i], static_cast<int64_t>(i), slices[i], pieces, whole);
  const Rates rates{static_cast<float>(1.0 - rate * decay), static_cast<float>(beta1), static_cast<float>(beta2),
                    static_cast<float>(eps), static_cast<float>(scale), static_cast<float>(toward)};
  std::vector<Place> places;
  for (size_t i = 0; i < weights.size(); ++i) {
    float* step = steps[i].mutable_data_ptr<float>();
    const double n = *step += 1.0f;
    const Corrected corrected{static_cast<float>(rate / (1.0 - std::pow(beta1, n))),
                              static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, n)))};
    places.push_back({weights[i].mutable_data_ptr<float>(), first[i].mutable_data_ptr<float>(),
                      second[i].mutable_data_ptr<float>(),
                      averages.empty() ? nullptr : averages[i].mutable_data_ptr<float>(),
                      narrowed.empty() ? nullptr : reinterpret_cast<uint16_t*>(narrowed[i].mutable_data_ptr<bf16>()),
                      gradients[i].const_data_ptr<float>(), corrected});
  }
  std::vector<char> idle(whole.size());
  const int64_t many = static_cast<int64_t>(whole.size()), all = static_cast<int64_t>(pieces.size());
  run_tasks(many, threads_for(many), [&](int64_t task, int) {
    const float* from = places[whole[task].tensor].gradient;
    idle[task] = std::all_of(from + whole[task].begin, from + whole[task].end, [](float g) { return g == 0.0f; });
  });
  run_tasks(all, threads_for(all), [&](int64_t task, int) {
    const Piece& piece = pieces[task];
    if (piece.slice >= 0 && idle[piece.slice]) return rest(places[piece.tensor], rates, piece);
    update(places[piece.tensor], rates, piece);
  });
  // A graph that still needs the old numbers must be refused, as after torch's own optimizers.
  for (Tensors each : {weights, first, second, steps, averages, narrowed})
    for (const at::Tensor& one : each) one.unsafeGetTensorImpl()->bump_version();
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("gradient_norm(Tensor[] gradients) -> Tensor");
  library.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] steps, "
      "Tensor(e!)[] averages, Tensor(f!)[] narrowed, int[] slices, float rate, float beta1, float beta2, float eps, "
      "float decay, float scale, float toward) -> ()");
}

// Lists may be empty, and then say no device: one kernel for all that checks where its tensors are.
TORCH_LIBRARY_IMPL(gatewright, CompositeExplicitAutograd, library) {
  library.impl("gradient_norm", TORCH_FN(gatewright::gradient_norm));
  library.impl("adamw_", TORCH_FN(gatewright::adamw));
}
