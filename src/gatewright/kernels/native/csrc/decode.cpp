// Half a block of a decoder for a few tokens, as one operator each: the very operators that Python would call one
// by one, so that the numbers are the same bits and only the calls are saved.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "experts.h"

namespace gatewright {
namespace {

template <class Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<at::Tensor, at::Tensor> normed(const at::Tensor& x, const Maybe& y, const at::Tensor& weight, double eps) {
  static const auto norm =
      operator_of<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const Maybe&, const at::Tensor&, double)>(
          "gatewright::norm_forward");
  auto found = norm.call(x, y, weight.to(at::kFloat).contiguous(), eps);
  return {std::get<0>(found), std::get<1>(found)};
}

std::vector<at::Tensor> mapped(const at::Tensor& x, at::TensorList weights) {
  static const auto maps =
      operator_of<std::vector<at::Tensor>(const at::Tensor&, at::TensorList)>("gatewright::few_rows_maps");
  return maps.call(x, weights);
}

// What attention adds to x [B, S, D], its norm first; keys and values [B, Hkv, capacity, d] get S positions more.
at::Tensor decode_attention(const at::Tensor& x, const at::Tensor& norm, double eps, const at::Tensor& w_query,
                            const at::Tensor& w_key, const at::Tensor& w_value, const at::Tensor& w_output,
                            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& keys,
                            const at::Tensor& values, int64_t past) {
  at::AutoDispatchBelowADInplaceOrView below;  // nobody asks for a gradient
  using Two = std::tuple<at::Tensor, at::Tensor>;
  static const auto rotate = operator_of<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool)>(
      "gatewright::rotate_pair");
  static const auto attend =
      operator_of<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>("gatewright::attention_forward");
  TORCH_CHECK_VALUE(x.dim() == 3 && keys.dim() == 4 && keys.sizes() == values.sizes() && keys.size(0) == x.size(0),
                    "decode_attention: takes x [B, S, D], keys and values [B, Hkv, capacity, d]");
  const int64_t B = x.size(0), S = x.size(1), heads = keys.size(1), d = keys.size(3), end = past + S;
  TORCH_CHECK_VALUE(past >= 0 && end <= keys.size(2) && d > 0 && w_query.dim() == 2 && w_query.size(0) % d == 0 &&
                        w_key.dim() == 2 && w_key.size(0) == heads * d && w_value.dim() == 2 && w_value.size(0) == heads * d,
                    "decode_attention: the maps, the cache and ", end, " positions do not fit");
  const at::Tensor rows = std::get<1>(normed(x.reshape({B * S, x.size(2)}).contiguous(), std::nullopt, norm, eps));
  const std::vector<at::Tensor> made = mapped(rows, {w_query, w_key, w_value});
  auto heads_of = [&](const at::Tensor& one) { return one.view({B, S, -1, d}).transpose(1, 2); };
  const auto [q, k] = rotate.call(heads_of(made[0]), heads_of(made[1]), cos.contiguous(), sin.contiguous(), false);
  keys.narrow(2, past, S).copy_(k);
  values.narrow(2, past, S).copy_(heads_of(made[2]));
  const at::Tensor y = std::get<0>(attend.call(q, keys.narrow(2, 0, end), values.narrow(2, 0, end), past));
  return mapped(y.transpose(1, 2).reshape({B * S, -1}).contiguous(), {w_output})[0].view(x.sizes());
}

// x + y, and what a sparse layer of E experts adds to it, its norm first: [B, S, D].
at::Tensor decode_experts(const at::Tensor& x, const at::Tensor& y, const at::Tensor& norm, double eps,
                          const at::Tensor& router, const Maybe& bias, int64_t selected, c10::string_view scores,
                          c10::string_view weights, double scale, double least_sum,
                          const at::Tensor& w_in, const at::Tensor& w_down, const Maybe& scale_in, const Maybe& scale_down,
                          const Maybe& b_in, const Maybe& b_down, c10::string_view activation) {
  at::AutoDispatchBelowADInplaceOrView below;
  using Routed = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                            at::Tensor, at::Tensor>;
  using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  static const auto route = operator_of<Routed(const at::Tensor&, const Maybe&, const Maybe&, int64_t, c10::string_view,
                                               c10::string_view, double, double, bool, int64_t)>("gatewright::route");
  static const auto plan = operator_of<Three(const at::Tensor&, int64_t)>("gatewright::plan_rows");
  static const auto experts =
      operator_of<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Maybe&,
                             const Maybe&, const Maybe&, const Maybe&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, c10::string_view, bool)>("gatewright::experts_few");
  TORCH_CHECK_VALUE(x.dim() == 3 && x.sizes() == y.sizes(), "decode_experts: takes x and y [B, S, D]");
  const int64_t rows = x.size(0) * x.size(1), D = x.size(2);
  const auto [total, own] = normed(x.reshape({rows, D}).contiguous(), y.reshape({rows, D}).contiguous(), norm, eps);
  // In fp32 whatever the tokens are: a router's logits are not rounded to bf16.
  const at::Tensor logits = own.scalar_type() == at::kFloat && router.scalar_type() == at::kFloat
                                ? mapped(own, {router})[0]
                                : mapped(own.to(at::kFloat), {router.to(at::kFloat)})[0];
  const Routed found = route.call(logits, std::nullopt, bias, selected, scores, weights, scale, least_sum, false, 0);
  const auto [token_ids, counts, slots] = plan.call(std::get<1>(found), router.size(0));
  const at::Tensor added = experts.call(own, std::get<0>(found), w_in, w_down, scale_in, scale_down, b_in, b_down, token_ids,
                                        counts, slots, activation, false);
  return total.add(added).view(x.sizes());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "decode_attention(Tensor x, Tensor norm, float eps, Tensor w_query, Tensor w_key, Tensor w_value, Tensor w_output, "
      "Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int past) -> Tensor");
  m.def(
      "decode_experts(Tensor x, Tensor y, Tensor norm, float eps, Tensor router, Tensor? bias, int selected, str scores, "
      "str weights, float scale, float least_sum, Tensor w_in, Tensor w_down, Tensor? scale_in, "
      "Tensor? scale_down, Tensor? b_in, Tensor? b_down, str activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, m) {
  m.impl("decode_attention", decode_attention);
  m.impl("decode_experts", decode_experts);
}

}  // namespace gatewright
