// The K best of each row, for every rule.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "lanes.h"
#include "pool.h"
#include "tasks.h"

namespace gatewright {
namespace {

at::Tensor select_top(const at::Tensor& scores, int64_t count) {
  TORCH_CHECK_VALUE(scores.dim() == 2 && scores.scalar_type() == at::kFloat && scores.is_contiguous(), "scores ",
                    scores.sizes(), " ", scores.scalar_type(), "; allowed: contiguous float32 [T, E]");
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  TORCH_CHECK_VALUE(1 <= count && count <= experts, "num_selected ", count, "; allowed: 1 to ", experts);
  at::Tensor out = at::empty({tokens, count}, scores.options().dtype(at::kLong));
  const float* from = scores.const_data_ptr<float>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  constexpr int64_t kRows = 256;
  const int64_t pieces = (tokens + kRows - 1) / kRows;
  const int threads = threads_for(pieces);
  const int64_t room = (experts + count) * LANES;
  Scratch panels(static_cast<size_t>(room) * threads * sizeof(float));
  run_tasks(pieces, threads, [&](int64_t piece, int thread) {
    float* panel = panels.as<float>() + room * thread;
    auto keys = reinterpret_cast<int32_t*>(panel), chosen = keys + experts * LANES;
    const int64_t end = std::min(tokens, (piece + 1) * kRows);
    for (int64_t t = piece * kRows; t < end; t += LANES) {
      const int live = static_cast<int>(std::min<int64_t>(LANES, end - t));
      read_panel(from + t * experts, experts, live, panel);
      for (int64_t e = 0; e < experts; ++e) store(keys + e * LANES, key_of(load(panel + e * LANES)));
      choose(keys, experts, count, chosen);
      for (int i = 0; i < live; ++i)
        for (int64_t k = 0; k < count; ++k) to[(t + i) * count + k] = chosen[k * LANES + i];
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) { m.def("select_top(Tensor scores, int count) -> Tensor"); }
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("select_top", select_top); }

}  // namespace gatewright
