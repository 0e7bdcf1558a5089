// The smooth load of noisy top-K (parts/noise.py has the definition), and its sum, in one pass each way.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "numbers.h"
#include "pool.h"

namespace gatewright {
namespace {

constexpr int64_t kRows = 256;
constexpr float kLeastStd = 1e-6f;

void check_floats(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.device().is_cpu(),
                    "the native routers take contiguous fp32 tensors of the CPU");
}

// The tensors of a load: clean, noisy [T, E], std [T, E] or [1], chosen [T, K], mask [T] or none.
struct Load {
  const float *clean, *noisy, *std;
  const int64_t* chosen;
  const bool* mask;
  int64_t T, E, K;
  bool one_std, excluding;

  Load(const at::Tensor& clean_, const at::Tensor& noisy_, const at::Tensor& std_, const at::Tensor& chosen_,
       const std::optional<at::Tensor>& mask_, bool excluding_)
      : T(clean_.size(0)), E(clean_.size(1)), K(chosen_.size(1)), one_std(std_.numel() == 1), excluding(excluding_) {
    for (const at::Tensor& each : {clean_, noisy_, std_}) check_floats(each);
    TORCH_CHECK_VALUE(noisy_.sizes() == clean_.sizes() && (one_std || std_.sizes() == clean_.sizes()) &&
                          chosen_.size(0) == T && chosen_.is_contiguous() && 0 < K && K < E &&
                          (!mask_ || (mask_->numel() == T && mask_->is_contiguous())),
                      "load: shapes do not fit");
    if (chosen_.numel() > 0) {
      const int64_t* ids = chosen_.const_data_ptr<int64_t>();
      const auto [low, high] = std::minmax_element(ids, ids + chosen_.numel());
      TORCH_CHECK_VALUE(*low >= 0 && *high < E, "load: chosen experts are outside 0 to ", E - 1);
    }
    clean = clean_.const_data_ptr<float>(), noisy = noisy_.const_data_ptr<float>();
    std = std_.const_data_ptr<float>(), chosen = chosen_.const_data_ptr<int64_t>();
    mask = mask_ ? mask_->const_data_ptr<bool>() : nullptr;
  }

  bool real(int64_t t) const { return mask == nullptr || mask[t]; }

  // Writes z, the spread and, with `excluding`, the noisy logits of the rest (-inf for the chosen); returns the
  // best of the rest.
  float standardise(int64_t t, float* __restrict z, float* __restrict spread, float* __restrict rest) const {
    const float *__restrict own = clean + t * E, *__restrict seen = noisy + t * E;
    const float* __restrict wide = std + (one_std ? 0 : t * E);
    const int64_t* ids = chosen + t * K;
    const float last = seen[ids[K - 1]];
    if (one_std) std::fill(spread, spread + E, wide[0] < kLeastStd ? kLeastStd : wide[0]);
    for (int64_t e = 0; e < E && !one_std; ++e) spread[e] = wide[e] < kLeastStd ? kLeastStd : wide[e];
    for (int64_t e = 0; e < E; ++e) z[e] = own[e] - last;
    for (int64_t e = 0; e < E && excluding; ++e) rest[e] = seen[e];
    float best = -std::numeric_limits<float>::infinity();
    if (excluding) {
      for (int64_t k = 0; k < K; ++k) rest[ids[k]] = -std::numeric_limits<float>::infinity();
      for (int64_t e = 0; e < E; ++e) best = rest[e] > best ? rest[e] : best;
      for (int64_t k = 0; k < K; ++k) z[ids[k]] = own[ids[k]] - best;
    }
    for (int64_t e = 0; e < E; ++e) z[e] /= spread[e];
    return best;
  }
};

// Sums over tokens of Phi(z), [groups, E]: token t is of group t % groups. Parts are cut by rows alone, so that
// sums do not depend on threads.
at::Tensor load_forward(const at::Tensor& clean, const at::Tensor& noisy, const at::Tensor& std, const at::Tensor& chosen,
                        const std::optional<at::Tensor>& mask, bool excluding, int64_t groups) {
  const Load load(clean, noisy, std, chosen, mask, excluding);
  TORCH_CHECK_VALUE(groups > 0, "load: groups ", groups);
  const int64_t E = load.E, parts = (load.T + kRows - 1) / kRows, width = groups * E;
  std::vector<float> sums(parts * width, 0.0f);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(3 * E);
    float *__restrict z = buffer.data(), *__restrict spread = z + E, *__restrict rest = spread + E;
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t t = part * kRows; t < std::min(load.T, (part + 1) * kRows); ++t) {
        if (!load.real(t)) continue;
        load.standardise(t, z, spread, rest);
        float* __restrict sum = sums.data() + part * width + t % groups * E;
        for (int64_t e = 0; e < E; ++e) sum[e] += 0.5f * erfc_of(z[e] * -0.70710678f);
      }
    }
  });
  at::Tensor total = pooled_empty({groups, E}, at::kFloat);
  float* to = total.mutable_data_ptr<float>();
  for (int64_t e = 0; e < width; ++e) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * width + e];
    to[e] = static_cast<float>(sum);
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> load_backward(const at::Tensor& gradient, const at::Tensor& clean,
                                                             const at::Tensor& noisy, const at::Tensor& std,
                                                             const at::Tensor& chosen,
                                                             const std::optional<at::Tensor>& mask, bool excluding,
                                                             int64_t groups, bool need_std) {
  const Load load(clean, noisy, std, chosen, mask, excluding);
  check_floats(gradient);
  const int64_t E = load.E, K = load.K;
  TORCH_CHECK_VALUE(groups > 0 && gradient.numel() == groups * E, "load: gradient of ", gradient.numel(), " for ",
                    groups, " x ", E);
  need_std = need_std && !load.one_std;
  at::Tensor of_clean = pooled_empty(clean.sizes(), at::kFloat), of_noisy = pooled_empty(clean.sizes(), at::kFloat);
  at::Tensor of_std = pooled_empty(need_std ? clean.sizes() : at::IntArrayRef({0}), at::kFloat);
  const float* given = gradient.const_data_ptr<float>();
  float *to_clean = of_clean.mutable_data_ptr<float>(), *to_noisy = of_noisy.mutable_data_ptr<float>();
  float* to_std = need_std ? of_std.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, load.T, kRows, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(3 * E);
    float *__restrict z = buffer.data(), *__restrict spread = z + E, *__restrict rest = spread + E;
    for (int64_t t = begin; t < end; ++t) {
      float *__restrict slope = to_clean + t * E, *__restrict back = to_noisy + t * E;
      const float* __restrict due = given + t % groups * E;
      std::fill(back, back + E, 0.0f);
      if (!load.real(t)) {
        std::fill(slope, slope + E, 0.0f);
        if (need_std) std::fill(to_std + t * E, to_std + (t + 1) * E, 0.0f);
        continue;
      }
      const float best = load.standardise(t, z, spread, rest);
      // Eight sums side by side, so that the compiler may add vectors.
      float lanes[8] = {};
      for (int64_t e = 0; e < E; ++e) {
        float exponent = z[e] * z[e] * -0.5f;
        exponent = exponent < -80.0f ? -80.0f : exponent;
        slope[e] = exp_of(exponent) * 0.39894228f * due[e] / spread[e];
      }
      for (int64_t e = 0; e + 8 <= E; e += 8)
        for (int64_t j = 0; j < 8; ++j) lanes[j] += slope[e + j];
      float moved = 0.0f;
      for (int64_t j = 0; j < 8; ++j) moved += lanes[j];
      for (int64_t e = E / 8 * 8; e < E; ++e) moved += slope[e];
      const int64_t* ids = load.chosen + t * K;
      if (load.excluding) {
        float of_chosen = 0.0f;
        for (int64_t k = 0; k < K; ++k) of_chosen += slope[ids[k]];
        moved -= of_chosen;
        int64_t ties = 0;
        for (int64_t e = 0; e < E; ++e) ties += rest[e] == best;
        const float share = ties > 0 ? -of_chosen / static_cast<float>(ties) : 0.0f;
        for (int64_t e = 0; e < E; ++e) back[e] = rest[e] == best ? share : 0.0f;
      }
      back[ids[K - 1]] -= moved;
      if (need_std) {
        const float* wide = load.std + t * E;
        float* out = to_std + t * E;
        for (int64_t e = 0; e < E; ++e) out[e] = wide[e] >= kLeastStd ? -z[e] * slope[e] : 0.0f;
      }
    }
  });
  return {of_clean, of_noisy, of_std};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def(
      "load_forward(Tensor clean, Tensor noisy, Tensor std, Tensor chosen, Tensor? mask, bool excluding, int groups) "
      "-> Tensor");
  library.def(
      "load_backward(Tensor gradient, Tensor clean, Tensor noisy, Tensor std, Tensor chosen, Tensor? mask, "
      "bool excluding, int groups, bool need_std) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("load_forward", TORCH_FN(gatewright::load_forward));
  library.impl("load_backward", TORCH_FN(gatewright::load_backward));
}
