// Cross-entropy of rows of logits with one right answer each: one pass forwards, one backwards.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "experts.h"
#include "lanes.h"

namespace gatewright {
namespace {

constexpr int64_t kRows = 16;  // rows of a task, whose losses are summed apart

struct Rows {
  int64_t T, V;

  Rows(const at::Tensor& logits, const at::Tensor& targets) {
    TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous() && logits.device().is_cpu() &&
                          (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16),
                      "cross_entropy: logits are not contiguous [T, V] on the CPU, float32 or bfloat16");
    T = logits.size(0), V = logits.size(1);
    TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == T && targets.is_contiguous() &&
                          targets.device().is_cpu() && targets.scalar_type() == at::kLong,
                      "cross_entropy: targets are not contiguous [T] on the CPU, int64");
    const int64_t* ids = targets.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < T; ++t)
      TORCH_CHECK_INDEX(ids[t] >= 0 && ids[t] < V, "cross_entropy: target ", ids[t], "; allowed: 0 to ", V - 1);
  }
  int64_t tasks() const { return (T + kRows - 1) / kRows; }
};

// Calls body(j, values) for every LANES numbers of a row; lanes beyond its end hold -inf, whose exponential is 0.
template <class X, class Body>
inline void along(const X* row, int64_t V, const Body& body) {
  int64_t j = 0;
  float numbers[LANES];
  for (; j + LANES <= V; j += LANES) {
    if constexpr (is_bf16<X>) {
#pragma omp simd
      for (int i = 0; i < LANES; ++i) numbers[i] = widen(row[j + i]);
      body(j, load(numbers));
    } else {
      body(j, load(row + j));
    }
  }
  if (j == V) return;
  for (int i = 0; i < LANES; ++i) numbers[i] = j + i < V ? widen(row[j + i]) : -std::numeric_limits<float>::infinity();
  body(j, load(numbers));
}

template <class X>
float logsumexp_of(const X* row, int64_t V) {
  vf high = splat(-std::numeric_limits<float>::infinity());
  along(row, V, [&](int64_t, vf value) { high = where(value > high, value, high); });
  float top = high[0];
  for (int i = 1; i < LANES; ++i) top = high[i] > top ? high[i] : top;
  vf sums = splat(0.0f);
  along(row, V, [&](int64_t, vf value) { sums += exp(value - top); });
  return top + std::log(sum_of_lanes(sums));
}

// The mean over rows of logsumexp(row) - row[target], and each row's logsumexp.
std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits, const at::Tensor& targets) {
  const Rows rows(logits, targets);
  at::Tensor loss = pooled_empty({}, at::kFloat), kept = pooled_empty({rows.T}, at::kFloat);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  float* sums = data<float>(kept);
  std::vector<double> parts(rows.tasks(), 0.0);
  with_dtypes(logits.scalar_type(), logits.scalar_type(), [&]<class X, class Same>() {
    const X* from = static_cast<const X*>(logits.const_data_ptr());
    run_tasks(rows.tasks(), threads_for(rows.tasks()), [&](int64_t task, int) {
      for (int64_t t = task * kRows; t < std::min(rows.T, (task + 1) * kRows); ++t) {
        sums[t] = logsumexp_of(from + t * rows.V, rows.V);
        parts[task] += static_cast<double>(sums[t]) - static_cast<double>(widen(from[t * rows.V + ids[t]]));
      }
    });
  });
  double total = 0.0;
  for (double part : parts) total += part;
  *data<float>(loss) = static_cast<float>(total / static_cast<double>(rows.T));
  return {loss, kept};
}

// softmax(row) less 1 at the target, times grad / T, in the logits' dtype.
at::Tensor cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& targets,
                                  const at::Tensor& kept) {
  const Rows rows(logits, targets);
  TORCH_CHECK_VALUE(grad.numel() == 1 && grad.scalar_type() == at::kFloat && grad.device().is_cpu(),
                    "cross_entropy: the gradient is not one float32 number");
  TORCH_CHECK_VALUE(kept.dim() == 1 && kept.size(0) == rows.T && kept.is_contiguous() && kept.device().is_cpu() &&
                        kept.scalar_type() == at::kFloat, "cross_entropy: the kept sums are not float32 [T]");
  at::Tensor out = pooled_empty({rows.T, rows.V}, logits.scalar_type());
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const float* sums = kept.const_data_ptr<float>();
  const float scale = *grad.const_data_ptr<float>() / static_cast<float>(rows.T);
  with_dtypes(logits.scalar_type(), logits.scalar_type(), [&]<class X, class Same>() {
    const X* from = static_cast<const X*>(logits.const_data_ptr());
    run_tasks(rows.tasks(), threads_for(rows.tasks()), [&](int64_t task, int) {
      for (int64_t t = task * kRows; t < std::min(rows.T, (task + 1) * kRows); ++t) {
        const X* row = from + t * rows.V;
        X* to = data<X>(out) + t * rows.V;
        const float sum = sums[t];
        along(row, rows.V, [&](int64_t j, vf value) {
          const vf share = exp(value - sum) * scale;
          float numbers[LANES];
          gatewright::store(numbers, share);
          if (j + LANES <= rows.V) {
#pragma omp simd
            for (int i = 0; i < LANES; ++i) to[j + i] = narrow<X>(numbers[i]);
          } else {
            for (int64_t i = 0; i < rows.V - j; ++i) to[j + i] = narrow<X>(numbers[i]);
          }
        });
        // The target's share anew: less 1 before it is rounded.
        const float own = widen(row[ids[t]]) - sum;
        to[ids[t]] = narrow<X>((exp(splat(own))[0] - 1.0f) * scale);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("cross_entropy_forward(Tensor logits, Tensor targets) -> (Tensor, Tensor)");
  library.def("cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor kept) -> Tensor");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("cross_entropy_forward", TORCH_FN(gatewright::cross_entropy_forward));
  library.impl("cross_entropy_backward", TORCH_FN(gatewright::cross_entropy_backward));
}
