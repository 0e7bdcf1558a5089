// The plain feed-forward layer: one expert, whose rows are the tokens in their order.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <tuple>

#include "experts.h"

namespace gatewright {
namespace {

using Maybe = std::optional<at::Tensor>;

Inputs inputs_of(const at::Tensor& x, const at::Tensor& w_in, const at::Tensor& w_down, const Maybe& b_in,
                 const Maybe& b_down) {
  TORCH_CHECK_VALUE(x.dim() == 2 && w_in.dim() == 2 && w_down.dim() == 2, "x [T, D], w_in [H, D] and w_down [D, F] have 2 axes");
  auto stacked = [](const Maybe& bias) { return bias ? Maybe(bias->unsqueeze(0)) : Maybe(); };
  const int64_t T = x.size(0);
  const at::Tensor rows = at::arange(T, at::kLong);
  return {x, at::ones({T, 1}, at::kFloat), w_in.unsqueeze(0), w_down.unsqueeze(0), stacked(b_in), stacked(b_down), {},
          rows, at::full({1}, T, at::kLong), rows.unsqueeze(1), false};
}

std::tuple<at::Tensor, at::Tensor> mlp_forward(const at::Tensor& x, const at::Tensor& w_in, const at::Tensor& w_down,
                                               const Maybe& b_in, const Maybe& b_down, c10::string_view activation,
                                               bool keep) {
  return forward_of(inputs_of(x, w_in, w_down, b_in, b_down), activation, keep);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlp_backward(
    const at::Tensor& grad_y, const at::Tensor& pre, bool need_x, bool need_weights, const at::Tensor& x,
    const at::Tensor& w_in, const at::Tensor& w_down, const Maybe& b_in, const Maybe& b_down,
    c10::string_view activation) {
  const Gradients out = backward_of(inputs_of(x, w_in, w_down, b_in, b_down), grad_y, pre, need_x, need_weights, activation);
  auto flat = [&](const at::Tensor& found) { return found.defined() ? found.squeeze(0) : at::empty({0}, x.options()); };
  return {out.x.defined() ? out.x : at::empty({0}, x.options()), flat(out.w_in), flat(out.w_down), flat(out.b_in),
          flat(out.b_down)};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def(
      "mlp_forward(Tensor x, Tensor w_in, Tensor w_down, Tensor? b_in, Tensor? b_down, str activation, bool keep) -> "
      "(Tensor, Tensor)");
  library.def(
      "mlp_backward(Tensor grad_y, Tensor pre, bool need_x, bool need_weights, Tensor x, Tensor w_in, Tensor w_down, "
      "Tensor? b_in, Tensor? b_down, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("mlp_forward", TORCH_FN(gatewright::mlp_forward));
  library.impl("mlp_backward", TORCH_FN(gatewright::mlp_backward));
}
