// Both views of a dropless plan, by one counting sort.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace gatewright {
namespace {

// token_ids [M], counts [E] and slots [T, K] of experts [T, K], -1 for an empty place; rows of an expert stand in
// the order of their places.
std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_rows(const at::Tensor& experts, int64_t num_experts) {
  TORCH_CHECK_VALUE(experts.dim() == 2 && experts.scalar_type() == at::kLong && experts.device().is_cpu() &&
                        experts.is_contiguous() && num_experts >= 0,
                    "plan_rows: takes contiguous int64 experts [T, K] on the CPU");
  const int64_t places = experts.numel(), per_token = experts.size(1);
  const int64_t* from = experts.const_data_ptr<int64_t>();
  at::Tensor counts = at::empty({num_experts}, experts.options());
  int64_t* held = counts.mutable_data_ptr<int64_t>();
  std::fill(held, held + num_experts, 0);
  int64_t kept = 0;
  for (int64_t i = 0; i < places; ++i) {
    TORCH_CHECK_VALUE(from[i] < num_experts, "experts hold ", from[i], "; allowed: up to ", num_experts - 1);
    if (from[i] < 0) continue;
    ++held[from[i]];
    ++kept;
  }
  std::vector<int64_t> next(num_experts);
  for (int64_t e = 1; e < num_experts; ++e) next[e] = next[e - 1] + held[e - 1];
  at::Tensor token_ids = at::empty({kept}, experts.options()), slots = at::empty_like(experts);
  int64_t* tokens = token_ids.mutable_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, i = 0; i < places; ++t)
    for (int64_t k = 0; k < per_token; ++k, ++i) {
      slot[i] = from[i] < 0 ? -1 : next[from[i]]++;
      if (slot[i] >= 0) tokens[slot[i]] = t;
    }
  return {token_ids, counts, slots};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("plan_rows(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) { library.impl("plan_rows", TORCH_FN(gatewright::plan_rows)); }
