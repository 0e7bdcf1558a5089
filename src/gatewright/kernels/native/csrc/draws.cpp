// What routers draw: the words of a stream (parts/draws.py has the definition), and jitter.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "pool.h"

// Every operation rounds by itself, so that these numbers are those of torch's own operators.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("-ffp-contract=off")
#endif

namespace gatewright {
namespace {

constexpr int64_t kWords = 1 << 15;

struct Stream {
  uint32_t start, step;
  Stream(const at::Tensor& start_, const at::Tensor& step_)
      : start(static_cast<uint32_t>(start_.const_data_ptr<int32_t>()[0])),
        step(static_cast<uint32_t>(step_.const_data_ptr<int32_t>()[0])) {}
  uint32_t word(uint32_t i) const {
    uint32_t x = i * step + start;
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0xD35A2D97u;
    return x ^ (x >> 15);
  }
};

void check_floats(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.device().is_cpu(),
                    "the native routers take contiguous fp32 tensors of the CPU");
}

// out[i] = (word i >> shift) * cell + middle, the word taken as signed.
void draw_uniform(at::Tensor& out, const at::Tensor& start, const at::Tensor& step, int64_t shift, double cell,
                  double middle) {
  check_floats(out);
  const Stream stream(start, step);
  const float scale = static_cast<float>(cell), offset = static_cast<float>(middle);
  const int places = static_cast<int>(shift);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel(), kWords, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t word = static_cast<int32_t>(stream.word(static_cast<uint32_t>(i)));
      to[i] = static_cast<float>(word >> places) * scale + offset;
    }
  });
}

// x[i] (eps u + 1), u the low half of word i / 2 for even i, else the high half, over 2^15.
at::Tensor jitter(const at::Tensor& x, const at::Tensor& start, const at::Tensor& step, double eps) {
  check_floats(x);
  const Stream stream(start, step);
  at::Tensor out = pooled_empty(x.sizes(), at::kFloat);
  const float scale = static_cast<float>(eps / 32768.0);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t size = x.numel();
  at::parallel_for(0, (size + 1) / 2, kWords, [&](int64_t begin, int64_t end) {
    float factors[1024];
    for (int64_t i = begin; i < end; i += 512) {
      const int64_t words = std::min<int64_t>(512, end - i);
      for (int64_t j = 0; j < words; ++j) {
        const uint32_t word = stream.word(static_cast<uint32_t>(i + j));
        factors[2 * j] = static_cast<float>(static_cast<int32_t>(word << 16) >> 16) * scale + 1.0f;
        factors[2 * j + 1] = static_cast<float>(static_cast<int32_t>(word) >> 16) * scale + 1.0f;
      }
      const int64_t many = std::min(2 * words, size - 2 * i);
      for (int64_t j = 0; j < many; ++j) to[2 * i + j] = from[2 * i + j] * factors[j];
    }
  });
  return out;
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("draw_uniform_(Tensor(a!) out, Tensor start, Tensor step, int shift, float cell, float middle) -> ()");
  library.def("jitter(Tensor x, Tensor start, Tensor step, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("draw_uniform_", TORCH_FN(gatewright::draw_uniform));
  library.impl("jitter", TORCH_FN(gatewright::jitter));
}
