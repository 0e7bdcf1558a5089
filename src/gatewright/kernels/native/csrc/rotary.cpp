// Rotary positions of queries and keys in one pass.
#include "attention.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

namespace gatewright {
namespace {

// One row by its position's cos and sin [d], the halves against each other; `back` gives the transposed map.
template <class T, class A>
void turn(const T* x, const A* cos, const A* sin, int64_t d, bool back, T* y) {
  const int64_t half = d / 2;
  const float sign = back ? -1.0f : 1.0f;
  // In y = M x the first half takes its own sin; in the transposed map each half takes the other's.
  const A *low = back ? sin + half : sin, *high = back ? sin : sin + half;
  int64_t j = 0;
  for (; j + LANES <= half; j += LANES) {
    const vf a = load_as(x + j), b = load_as(x + half + j);
    store_as(y + j, a * load_as(cos + j) - b * (load_as(low + j) * sign));
    store_as(y + half + j, b * load_as(cos + half + j) + a * (load_as(high + j) * sign));
  }
  for (; j < half; ++j) {
    const float a = widen(x[j]), b = widen(x[half + j]);
    y[j] = narrow<T>(a * widen(cos[j]) - b * (widen(low[j]) * sign));
    y[half + j] = narrow<T>(b * widen(cos[half + j]) + a * (widen(high[j]) * sign));
  }
}

template <class T, class A>
void turn_all(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back, const at::Tensor& y) {
  const int64_t B = x.size(0), H = x.size(1), S = x.size(2), d = x.size(3);
  const A *cosines = cos.const_data_ptr<A>(), *sines = sin.const_data_ptr<A>();
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  const int64_t b_in = x.stride(0), h_in = x.stride(1), s_in = x.stride(2), b_out = y.stride(0), h_out = y.stride(1),
                s_out = y.stride(2);
  // A row of all heads lies side by side more often than not: positions outside, heads inside.
  run_range(B * S, std::max<int64_t>(1, 16384 / (H * d)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / S, at = i % S;
      for (int64_t h = 0; h < H; ++h)
        turn(from + b * b_in + at * s_in + h * h_in, cosines + at * d, sines + at * d, d, back,
             to + b * b_out + at * s_out + h * h_out);
    }
  });
}

at::Tensor rotate_one(const at::Tensor& given, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  const auto kind = given.scalar_type(), angles = cos.scalar_type();
  auto known = [](at::ScalarType one) { return one == at::kFloat || one == at::kBFloat16; };
  TORCH_CHECK_VALUE(given.dim() == 4 && given.size(3) % 2 == 0, "rotate: x ", given.sizes(), "; allowed: [B, H, S, even]");
  const at::IntArrayRef wanted = given.sizes().slice(2);
  TORCH_CHECK_VALUE(cos.sizes() == wanted && sin.sizes() == wanted && cos.is_contiguous() && sin.is_contiguous(),
                    "rotate: cos ", cos.sizes(), " and sin ", sin.sizes(), " of x ", given.sizes());
  TORCH_CHECK_VALUE(known(kind) && known(angles) && sin.scalar_type() == angles && given.device().is_cpu() &&
                        cos.device().is_cpu() && sin.device().is_cpu(),
                    "rotate: takes float32 and bfloat16 on the CPU, not ", kind, " by ", angles);
  const at::Tensor x = with_rows(given);
  const at::Tensor y = empty_heads(x.size(0), x.size(1), x.size(2), x.size(3), kind);
  if (x.numel() == 0) return y;
  with_kind(kind, [&]<class T>() {
    with_kind(angles, [&]<class A>() { turn_all<T, A>(x, cos, sin, back, y); });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> rotate_pair(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                               const at::Tensor& sin, bool back) {
  return {rotate_one(q, cos, sin, back), rotate_one(k, cos, sin, back)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def("rotate_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("rotate_pair", rotate_pair); }

}  // namespace gatewright
