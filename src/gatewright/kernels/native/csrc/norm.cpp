// Root-mean-square normalisation in one pass over a row, with the addition before it, and its backward pass.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "experts.h"

namespace gatewright {
namespace {

// Rows whose gradients of the scale are summed apart, so that sums do not depend on threads.
inline int64_t rows_of_part(int64_t T) { return std::max<int64_t>(64, (T + 15) / 16); }

void check_rows(const at::Tensor& rows, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(rows.sizes() == like.sizes() && rows.is_contiguous() && rows.device().is_cpu(), "norm: ", name, " ",
                    rows.sizes(), " is not contiguous, on the CPU and of x's shape ", like.sizes());
}

void check(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) >= 1, "norm: x ", x.sizes(), "; allowed: [T, D], D 1 or more");
  check_rows(x, x, "x");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "norm: x is ", x.scalar_type(),
                    "; allowed: float32, bfloat16");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous() &&
                        weight.device().is_cpu() && weight.scalar_type() == at::kFloat,
                    "norm: weight is not float32 [D]");
}

// Calls body<X, Y>() for the dtypes of x and of what is added to it, which is never wider.
template <class Body>
void with_pair(at::ScalarType x, at::ScalarType y, Body&& body) {
  if (x == at::kBFloat16) return body.template operator()<bf16, bf16>();
  if (y == at::kFloat) return body.template operator()<float, float>();
  body.template operator()<float, bf16>();
}

template <class X, class Y>
void forward(int64_t T, int64_t D, const X* x, const Y* y, const float* __restrict weight, double eps, X* sums, X* normed,
             float* roots) {
  run_range(T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const X* __restrict row = x + t * D;
      if (y != nullptr) {
        X* __restrict sum = sums + t * D;
        const Y* __restrict more = y + t * D;
        for (int64_t j = 0; j < D; ++j) sum[j] = narrow<X>(widen(row[j]) + widen(more[j]));
        row = sum;
      }
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < D; ++j) squares += widen(row[j]) * widen(row[j]);
      const float root = 1.0f / std::sqrt(squares / static_cast<float>(D) + static_cast<float>(eps));
      roots[t] = root;
      X* __restrict out = normed + t * D;
      for (int64_t j = 0; j < D; ++j) out[j] = narrow<X>(widen(row[j]) * root * weight[j]);
    }
  });
}

// s = x + y where y is given, else x itself; returns s (nothing without y), s / rms(s) * weight, and 1 / rms(s).
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_forward(const at::Tensor& x, const std::optional<at::Tensor>& y,
                                                            const at::Tensor& weight, double eps) {
  check(x, weight);
  const int64_t T = x.size(0), D = x.size(1);
  const auto kind = x.scalar_type();
  if (y) {
    check_rows(*y, x, "y");
    TORCH_CHECK_VALUE(y->scalar_type() == at::kBFloat16 || (y->scalar_type() == at::kFloat && kind == at::kFloat),
                      "norm: y is ", y->scalar_type(), " for x ", kind, "; allowed: bfloat16, or float32 as x is");
  }
  at::Tensor sums = pooled_empty({y ? T : 0, D}, kind), normed = pooled_empty({T, D}, kind),
             roots = pooled_empty({T}, at::kFloat);
  with_pair(kind, y ? y->scalar_type() : kind, [&]<class X, class Y>() {
    forward<X, Y>(T, D, data<X>(x), data<Y>(y), data<float>(weight), eps, data<X>(sums), data<X>(normed),
                  data<float>(roots));
  });
  return {sums, normed, roots};
}

template <class X>
void backward(int64_t T, int64_t D, const X* g, const X* more, const X* s, const float* roots,
              const float* __restrict weight, X* of_s, float* of_weight) {
  const int64_t rows = rows_of_part(T), parts = (T + rows - 1) / rows;
  Scratch partial(parts * D * sizeof(float));
  run_tasks(parts, threads_for(parts), [&](int64_t part, int) {
    float* __restrict sums = partial.as<float>() + part * D;
    std::fill_n(sums, D, 0.0f);
    for (int64_t t = part * rows; t < std::min(T, (part + 1) * rows); ++t) {
      const X *__restrict given = g + t * D, *__restrict row = s + t * D;
      const float root = roots[t];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < D; ++j) {
        const float along = widen(given[j]) * widen(row[j]);
        dot += along * weight[j];
        sums[j] += along * root;
      }
      const float share = dot / static_cast<float>(D) * root * root;
      X* __restrict out = of_s + t * D;
      if (more == nullptr) {
        for (int64_t j = 0; j < D; ++j)
          out[j] = narrow<X>(root * (widen(given[j]) * weight[j] - widen(row[j]) * share));
      } else {
        const X* __restrict beside = more + t * D;
        for (int64_t j = 0; j < D; ++j)
          out[j] = narrow<X>(widen(beside[j]) + root * (widen(given[j]) * weight[j] - widen(row[j]) * share));
      }
    }
  });
  std::fill_n(of_weight, D, 0.0f);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t j = 0; j < D; ++j) of_weight[j] += partial.as<float>()[part * D + j];
}

// The gradients of s and of the weight, from that of the normed rows and, if there is one, the rest of s's own.
std::tuple<at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad, const std::optional<at::Tensor>& grad_sum,
                                                 const at::Tensor& sums, const at::Tensor& roots,
                                                 const at::Tensor& weight) {
  check(sums, weight);
  const int64_t T = sums.size(0), D = sums.size(1);
  const auto kind = sums.scalar_type();
  check_rows(grad, sums, "gradient");
  if (grad_sum) check_rows(*grad_sum, sums, "the sum's gradient");
  TORCH_CHECK_VALUE(grad.scalar_type() == kind && (!grad_sum || grad_sum->scalar_type() == kind),
                    "norm: a gradient is not of x's dtype");
  TORCH_CHECK_VALUE(roots.dim() == 1 && roots.size(0) == T && roots.is_contiguous() && roots.device().is_cpu() &&
                        roots.scalar_type() == at::kFloat, "norm: roots are not float32 [T]");
  at::Tensor of_s = pooled_empty({T, D}, kind), of_weight = pooled_empty({D}, at::kFloat);
  with_pair(kind, kind, [&]<class X, class Y>() {
    backward<X>(T, D, data<X>(grad), data<X>(grad_sum), data<X>(sums), data<float>(roots), data<float>(weight),
                data<X>(of_s), data<float>(of_weight));
  });
  return {of_s, of_weight};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("norm_forward(Tensor x, Tensor? y, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor sums, Tensor roots, Tensor weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("norm_forward", TORCH_FN(gatewright::norm_forward));
  library.impl("norm_backward", TORCH_FN(gatewright::norm_backward));
}
