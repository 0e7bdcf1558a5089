// Several linear maps of the same tokens, each panel of which is read once for all of them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "numbers.h"
#include "pool.h"

namespace gatewright {
namespace {

// Rows of a panel, which stays in the caches; parts of the tokens whose sums are taken apart, so that they do not
// depend on threads.
constexpr int64_t kPanel = 128, kParts = 8;

// Sizes of a call: T tokens of width D, and each map's outputs; raises where they do not fit.
struct Maps {
  int64_t T, D;
  std::vector<int64_t> outputs;

  Maps(const at::Tensor& x, at::TensorList weights) : T(x.size(0)), D(x.size(1)) {
    auto fits = [](const at::Tensor& one) { return one.dim() == 2 && one.is_contiguous() && one.device().is_cpu(); };
    bool right = fits(x) && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
    for (const at::Tensor& weight : weights) {
      right = right && fits(weight) && weight.scalar_type() == at::kFloat && weight.size(1) == D;
      outputs.push_back(weight.size(0));
    }
    TORCH_CHECK_VALUE(right, "maps: takes contiguous matrices of one width on the CPU, fp32 or, for x, bf16");
  }
  int64_t panels() const { return (T + kPanel - 1) / kPanel; }
  int64_t rows(int64_t panel) const { return std::min(kPanel, T - panel * kPanel); }
};

// Rows of x in fp32: themselves, or widened into `room`.
const float* wide_rows(const at::Tensor& x, int64_t begin, int64_t rows, std::vector<float>& room) {
  const int64_t D = x.size(1);
  if (x.scalar_type() == at::kFloat) return x.const_data_ptr<float>() + begin * D;
  room.resize(kPanel * D);
  const bf16* from = x.const_data_ptr<bf16>() + begin * D;
  for (int64_t j = 0; j < rows * D; ++j) room[j] = widen(from[j]);
  return room.data();
}

// y_i = x W_i^T, [T, N_i] each.
std::vector<at::Tensor> maps_forward(const at::Tensor& x, at::TensorList weights) {
  const Maps maps(x, weights);
  const int64_t D = maps.D, count = weights.size();
  std::vector<at::Tensor> outs;
  std::vector<float*> to;
  std::vector<std::vector<uint32_t>> packed(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t N = maps.outputs[i], wide = spread(N);
    outs.push_back(pooled_empty({maps.T, N}, at::kFloat));
    to.push_back(outs.back().mutable_data_ptr<float>());
    packed[i].resize(D * wide);
    pack_transposed<float, float>(weights[i].const_data_ptr<float>(), N, D, packed[i].data(), wide);
  }
  at::parallel_for(0, maps.panels(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room;
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* from = wide_rows(x, panel * kPanel, maps.rows(panel), room);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t N = maps.outputs[i];
        multiply(maps.rows(panel), N, D, from, D, packed[i].data(), spread(N),
                 to[i] + panel * kPanel * N, N, false);
      }
    }
    end_of_multiplying();
  });
  return outs;
}

// The gradients of x (none without `need_x`) and of each weight, from those of each y_i.
std::tuple<at::Tensor, std::vector<at::Tensor>> maps_backward(at::TensorList gradients, const at::Tensor& x,
                                                              at::TensorList weights, bool need_x) {
  const Maps maps(x, weights);
  const int64_t T = maps.T, D = maps.D, count = weights.size();
  TORCH_CHECK_VALUE(static_cast<int64_t>(gradients.size()) == count, "maps: one gradient for each map");
  std::vector<const float*> due, w;
  std::vector<int64_t> places;
  int64_t all = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& one = gradients[i];
    TORCH_CHECK_VALUE(one.scalar_type() == at::kFloat && one.is_contiguous() && one.dim() == 2 && one.size(0) == T &&
                          one.size(1) == maps.outputs[i],
                      "maps: gradient ", i, " does not fit");
    due.push_back(one.const_data_ptr<float>());
    w.push_back(weights[i].const_data_ptr<float>());
    places.push_back(all);
    all += maps.outputs[i] * D;
    most = std::max(most, maps.outputs[i]);
  }
  at::Tensor of_x = pooled_empty({need_x ? T : 0, D}, x.scalar_type());
  const bool narrowed = x.scalar_type() != at::kFloat;
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, maps.panels()));
  std::vector<float> sums(parts * all, 0.0f);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> turned(most * kPanel);
    std::vector<float> room, sum(narrowed && need_x ? kPanel * D : 0);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = maps.panels() * part / parts, last = maps.panels() * (part + 1) / parts;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t rows = maps.rows(panel), at = panel * kPanel;
        const float* from = wide_rows(x, at, rows, room);
        float* to_x = narrowed ? sum.data() : of_x.mutable_data_ptr<float>() + at * D;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t N = maps.outputs[i];
          const float* g = due[i] + at * N;
          if (need_x)
            multiply(rows, D, N, g, N, reinterpret_cast<const uint32_t*>(w[i]), D, to_x, D, i > 0);
          transpose_units(reinterpret_cast<const uint32_t*>(g), N, rows, N, turned.data(), kPanel);
          multiply(N, D, rows, reinterpret_cast<const float*>(turned.data()), kPanel,
                   reinterpret_cast<const uint32_t*>(from), D, sums.data() + part * all + places[i], D, true);
        }
        if (narrowed && need_x) {
          bf16* out = of_x.mutable_data_ptr<bf16>() + at * D;
          for (int64_t j = 0; j < rows * D; ++j) out[j] = narrow<bf16>(to_x[j]);
        }
      }
    }
    end_of_multiplying();
  });
  std::vector<at::Tensor> of_weights;
  for (int64_t i = 0; i < count; ++i) {
    of_weights.push_back(pooled_empty(weights[i].sizes(), at::kFloat));
    float* out = of_weights.back().mutable_data_ptr<float>();
    std::memcpy(out, sums.data() + places[i], maps.outputs[i] * D * sizeof(float));
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = sums.data() + part * all + places[i];
      for (int64_t j = 0; j < maps.outputs[i] * D; ++j) out[j] += more[j];
    }
  }
  return {of_x, of_weights};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("maps_forward(Tensor x, Tensor[] weights) -> Tensor[]");
  library.def("maps_backward(Tensor[] gradients, Tensor x, Tensor[] weights, bool need_x) -> (Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("maps_forward", TORCH_FN(gatewright::maps_forward));
  library.impl("maps_backward", TORCH_FN(gatewright::maps_backward));
}
