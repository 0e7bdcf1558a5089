// The gradient of the logits, from those of weights and sums, in one pass that computes the scores again.
#include "route.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

namespace gatewright {
namespace {

// Gradients of what the forward pass returned; null where nothing came.
struct Incoming {
  const float *weights, *score_sums;
  float log_sum, square_sum;
  bool any_log_sum;
};

struct Inputs {
  const float *logits, *kept;
  const int32_t* chosen;
  const bool* mask;
};

struct Panels {
  float *logits, *grads;
  int32_t* chosen;
  vf *picked, *of_picked;
};

size_t floats_per_thread(const Routing& r) { return static_cast<size_t>(2 * r.E + 3 * r.K) * LANES; }

Panels panels_at(float* base, const Routing& r) {
  const int64_t panel = r.E * LANES, few = r.K * LANES;
  float* rest = base + 2 * panel;
  return {base, base + panel, reinterpret_cast<int32_t*>(rest), reinterpret_cast<vf*>(rest + few),
          reinterpret_cast<vf*>(rest + 2 * few)};
}

vf lanes_of(const float* from, int live) {
  vf out{};
  for (int i = 0; i < live; ++i) out[i] = from[i];
  return out;
}

// Turns the gradient of the weights into that of the chosen scores (logits, for softmax_selected), in place.
void unweigh(const Routing& r, const vf* picked, vf* grads) {
  for (int64_t k = 0; k < r.K; ++k) grads[k] *= r.scale;
  vf dot{};
  if (r.weights == Weights::softmax_selected) {
    for (int64_t k = 0; k < r.K; ++k) dot += picked[k] * grads[k];
    for (int64_t k = 0; k < r.K; ++k) grads[k] = picked[k] * (grads[k] - dot);
  } else if (r.weights == Weights::renormalised) {
    vf sum = picked[0];
    for (int64_t k = 1; k < r.K; ++k) sum += picked[k];
    const vi small = sum < r.least;
    sum = where(small, splat(r.least), sum);
    for (int64_t k = 0; k < r.K; ++k) dot += picked[k] / sum * grads[k];
    dot = where(small, vf{}, dot);  // the sum was not looked at
    for (int64_t k = 0; k < r.K; ++k) grads[k] = (grads[k] - dot) / sum;
  }
}

template <Scores S>
void differentiate_panel(const Routing& r, const Panels& p, const Inputs& in, const Incoming& grad, int64_t group,
                         int64_t begin, int live) {
  auto x = reinterpret_cast<const vf*>(p.logits);
  auto out = reinterpret_cast<vf*>(p.grads);
  const vi real = real_lanes(in.mask, begin, live);
  vf kept[kNumKept];
  for (int which = 0; which < kNumKept; ++which) kept[which] = lanes_of(in.kept + which * r.T + begin, live);
  const vf most = kept[kMost], inverse = kept[kInverse], inverse_total = kept[kInverseTotal];
  const vf of_log_sum = only(real, grad.log_sum + 2.0f * grad.square_sum * kept[kLogSum]);
  const float* of_sums = grad.score_sums ? grad.score_sums + group * r.E : nullptr;
  vf dot{};
  for (int64_t e = 0; e < r.E; ++e) {
    out[e] = S == Scores::sigmoid ? sigmoid(x[e]) : exp(x[e] - most) * inverse;
    if (of_sums) dot += out[e] * of_sums[e];
  }
  dot = only(real, dot);
  const bool of_logits = S == Scores::identity || r.weights == Weights::softmax_selected;
  for (int64_t k = 0; k < r.K; ++k) {
    p.picked[k] = gather(of_logits ? p.logits : p.grads, p.chosen + k * LANES);
    p.of_picked[k] = vf{};
    if (grad.weights)
      for (int i = 0; i < live; ++i) p.of_picked[k][i] = grad.weights[(begin + i) * r.K + k];
  }
  if (r.weights == Weights::softmax_selected) softmax(p.picked, r.K);
  unweigh(r, p.picked, p.of_picked);
  if (!of_logits) {
    for (int64_t k = 0; k < r.K; ++k) {
      p.of_picked[k] *= S == Scores::sigmoid ? p.picked[k] * (1.0f - p.picked[k]) : p.picked[k];
      if (S == Scores::softmax) dot += p.of_picked[k];
    }
  }
  if constexpr (S == Scores::sigmoid) {
    dot *= inverse_total;
    for (int64_t e = 0; e < r.E; ++e) {
      const vf s = out[e];
      out[e] = of_sums ? only(real, (of_sums[e] - dot) * inverse_total) * s * (1.0f - s) : vf{};
      if (grad.any_log_sum) out[e] += of_log_sum * (exp(x[e] - most) * inverse);
    }
  } else {
    const vf rest = of_log_sum - dot;
    for (int64_t e = 0; e < r.E; ++e) out[e] *= of_sums ? only(real, splat(of_sums[e])) + rest : rest;
  }
  for (int64_t k = 0; k < r.K; ++k)
    for (int i = 0; i < live; ++i) p.grads[p.chosen[k * LANES + i] * LANES + i] += p.of_picked[k][i];
}

template <Scores S>
void differentiate_segment(const Routing& r, const Panels& p, const Inputs& in, const Incoming& grad,
                           const Segment& segment, float* out) {
  for (int64_t t = segment.begin; t < segment.end; t += LANES) {
    const int live = static_cast<int>(std::min<int64_t>(LANES, segment.end - t));
    read_panel(in.logits + t * r.E, r.E, live, p.logits);
    for (int64_t k = 0; k < r.K; ++k)
      for (int i = 0; i < LANES; ++i)
        p.chosen[k * LANES + i] = in.chosen[(t + std::min(i, live - 1)) * r.K + k];
    differentiate_panel<S>(r, p, in, grad, segment.group, t, live);
    write_panel(p.grads, r.E, live, out + t * r.E);
  }
}

const float* pointer(const Maybe& tensor, at::IntArrayRef shape, const char* name) {
  if (!tensor) return nullptr;
  TORCH_CHECK_VALUE(tensor->sizes() == shape && tensor->scalar_type() == at::kFloat && tensor->is_contiguous(), name,
                    " ", tensor->sizes(), "; allowed: contiguous float32 ", shape);
  return tensor->const_data_ptr<float>();
}

at::Tensor route_backward(const Maybe& of_weights, const Maybe& of_score_sums, const Maybe& of_log_sum,
                          const Maybe& of_square_sum, const at::Tensor& logits, const at::Tensor& chosen,
                          const at::Tensor& kept, const Maybe& mask, int64_t num_selected, c10::string_view scores,
                          c10::string_view weights, double scale, double least, int64_t group_size) {
  const Routing r =
      check_routing(logits, mask, {}, num_selected, scores, weights, scale, least, false, group_size);
  TORCH_CHECK_VALUE(chosen.sizes() == at::IntArrayRef({r.T, r.K}) && chosen.scalar_type() == at::kInt &&
                        chosen.is_contiguous(), "chosen ", chosen.sizes(), "; allowed: int32 [T, K]");
  const Inputs in{logits.const_data_ptr<float>(), pointer(kept, {kNumKept, r.T}, "kept"),
                  chosen.const_data_ptr<int32_t>(), mask ? mask->const_data_ptr<bool>() : nullptr};
  for (int64_t i = 0; i < r.T * r.K; ++i)
    TORCH_CHECK_VALUE(in.chosen[i] >= 0 && in.chosen[i] < r.E, "chosen holds ", in.chosen[i], "; allowed: experts");
  const float *plain = pointer(of_log_sum, {}, "gradient"), *square = pointer(of_square_sum, {}, "gradient");
  const Incoming grad{pointer(of_weights, {r.T, r.K}, "gradient of weights"),
                      pointer(of_score_sums, {groups_of(r), r.E}, "gradient of score sums"), plain ? *plain : 0.0f,
                      square ? *square : 0.0f, plain || square};
  at::Tensor out = pooled_empty({r.T, r.E}, at::kFloat);
  float* grads = out.mutable_data_ptr<float>();
  const auto segments = segments_of(r);
  const int threads = threads_for(segments.size());
  Scratch panels(floats_per_thread(r) * threads * sizeof(float));
  run_tasks(segments.size(), threads, [&](int64_t i, int thread) {
    const Panels own = panels_at(panels.as<float>() + floats_per_thread(r) * thread, r);
    const auto run = r.scores == Scores::softmax   ? differentiate_segment<Scores::softmax>
                     : r.scores == Scores::sigmoid ? differentiate_segment<Scores::sigmoid>
                                                   : differentiate_segment<Scores::identity>;
    run(r, own, in, grad, segments[i], grads);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "route_backward(Tensor? of_weights, Tensor? of_score_sums, Tensor? of_log_sum, Tensor? of_square_sum, "
      "Tensor logits, Tensor chosen, Tensor kept, Tensor? mask, int num_selected, str scores, str weights, "
      "float scale, float least, int group_size) -> Tensor");
}
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("route_backward", route_backward); }

}  // namespace gatewright
