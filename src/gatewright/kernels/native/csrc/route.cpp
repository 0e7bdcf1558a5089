// The router behind its logits: scores, the K best, their weights and the sums that losses take, in one pass.
#include "route.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace gatewright {

Routing check_routing(const at::Tensor& logits, const Maybe& mask, const Maybe& bias, int64_t num_selected,
                      c10::string_view scores, c10::string_view weights, double scale, double least, bool by_logits,
                      int64_t group_size) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() == at::kFloat && logits.is_contiguous(),
                    "logits ", logits.sizes(), " ", logits.scalar_type(), "; allowed: contiguous float32 [T, E]");
  Routing r{logits.size(0), logits.size(1), num_selected, group_size};
  if (r.group <= 0 || r.group > r.T) r.group = std::max<int64_t>(r.T, 1);
  TORCH_CHECK_VALUE(1 <= r.K && r.K <= r.E, "num_selected ", r.K, "; allowed: 1 to ", r.E);
  TORCH_CHECK_VALUE(r.E < (1 << 24), "num_experts ", r.E, "; allowed: less than 2 ** 24");
  TORCH_CHECK_VALUE(scores == "softmax" || scores == "sigmoid" || scores == "identity", "scores ", scores,
                    "; allowed: softmax, sigmoid, identity");
  TORCH_CHECK_VALUE(weights == "raw" || weights == "renormalised" || weights == "softmax_selected", "weights ",
                    weights, "; allowed: raw, renormalised, softmax_selected");
  r.scores = scores == "softmax" ? Scores::softmax : scores == "sigmoid" ? Scores::sigmoid : Scores::identity;
  r.weights = weights == "raw"            ? Weights::raw
              : weights == "renormalised" ? Weights::renormalised
                                          : Weights::softmax_selected;
  r.scale = static_cast<float>(scale);
  r.least = static_cast<float>(least);
  r.by_logits = by_logits || r.scores == Scores::identity;
  if (mask)
    TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef({r.T}) && mask->scalar_type() == at::kBool &&
                          mask->is_contiguous(), "mask ", mask->sizes(), "; allowed: contiguous bool [", r.T, "]");
  if (bias)
    TORCH_CHECK_VALUE(bias->sizes() == at::IntArrayRef({r.E}) && bias->scalar_type() == at::kFloat &&
                          bias->is_contiguous(), "bias ", bias->sizes(), "; allowed: contiguous float32 [", r.E, "]");
  return r;
}

std::vector<Segment> segments_of(const Routing& r) {
  std::vector<Segment> segments;
  for (int64_t group = 0, start = 0; start < r.T; ++group, start += r.group) {
    const int64_t stop = std::min(start + r.group, r.T);
    for (int64_t begin = start; begin < stop; begin += kSegment)
      segments.push_back({group, begin, std::min(begin + kSegment, stop)});
  }
  return segments;
}

namespace {

struct Outputs {
  float* weights;
  int64_t* experts;
  int32_t* chosen;
  float* kept;  // [kNumKept][T]
};

// What one segment adds to the sums over its group.
struct Sums {
  float* scores;    // [E]
  int32_t* counts;  // [2][E]: of all choices, of first ones
  double log_sum = 0, square_sum = 0;
  int64_t nonfinite = 0;
};

// A thread's panels.
struct Panels {
  float *logits, *scores;
  int32_t *keys, *chosen;
  vf *sums, *picked;
};

size_t floats_per_thread(const Routing& r) { return static_cast<size_t>(4 * r.E + 2 * r.K) * LANES; }

Panels panels_at(float* base, const Routing& r) {
  const int64_t panel = r.E * LANES;
  Panels p;
  p.logits = base;
  p.scores = base + panel;
  p.keys = reinterpret_cast<int32_t*>(base + 2 * panel);
  p.sums = reinterpret_cast<vf*>(base + 3 * panel);
  p.chosen = reinterpret_cast<int32_t*>(base + 4 * panel);
  p.picked = reinterpret_cast<vf*>(base + 4 * panel + r.K * LANES);
  return p;
}

// logsumexp of a row that is not finite, as torch has it.
float log_sum_of_row(const float* panel, int64_t experts, int lane, float most, float usual) {
  for (int64_t e = 0; e < experts; ++e)
    if (std::isnan(panel[e * LANES + lane])) return std::numeric_limits<float>::quiet_NaN();
  return std::isinf(most) ? most : usual;
}

// Weights of the chosen, in place of their scores (or logits, for softmax_selected).
void weigh(const Routing& r, vf* picked) {
  if (r.weights == Weights::softmax_selected) softmax(picked, r.K);
  if (r.weights == Weights::renormalised) {
    vf sum = picked[0];
    for (int64_t k = 1; k < r.K; ++k) sum += picked[k];
    sum = where(sum < r.least, splat(r.least), sum);
    for (int64_t k = 0; k < r.K; ++k) picked[k] /= sum;
  }
  if (r.scale != 1.0f)
    for (int64_t k = 0; k < r.K; ++k) picked[k] *= r.scale;
}

template <Scores S>
void route_panel(const Routing& r, const Panels& p, const bool* mask, const float* bias, int64_t begin, int live,
                 const Outputs& out, Sums& sums) {
  auto x = reinterpret_cast<const vf*>(p.logits);
  auto scores = reinterpret_cast<vf*>(p.scores);
  auto keys = reinterpret_cast<vi*>(p.keys);
  const vi real = real_lanes(mask, begin, live);
  vf most = splat(-std::numeric_limits<float>::infinity());
  vi finite = splat(int32_t{-1});
  for (int64_t e = 0; e < r.E; ++e) {
    most = where(x[e] > most, x[e], most);
    finite &= magnitude(x[e]) < std::numeric_limits<float>::infinity();
  }
  vf sum{}, total{};
  for (int64_t e = 0; e < r.E; ++e) {
    const vf power = exp(x[e] - most);
    sum += power;
    scores[e] = power;
    if constexpr (S == Scores::sigmoid) total += scores[e] = sigmoid(x[e]);
  }
  const vf inverse = 1.0f / sum;
  const vf inverse_total = 1.0f / where(total > 0.0f, total, splat(1.0f));
  for (int64_t e = 0; e < r.E; ++e) {
    const vf share = scores[e] * (S == Scores::sigmoid ? inverse_total : inverse);
    p.sums[e] += only(real, share);
    if constexpr (S == Scores::softmax) scores[e] = share;
  }
  // A barrier: scores are rounded before a bias is added, as they are where they weigh.
  asm("" ::: "memory");
  const vf* ranks = r.by_logits ? x : scores;
  for (int64_t e = 0; e < r.E; ++e) keys[e] = key_of(bias ? ranks[e] + bias[e] : ranks[e]);
  choose(p.keys, r.E, r.K, p.chosen);
  const bool of_logits = S == Scores::identity || r.weights == Weights::softmax_selected;
  for (int64_t k = 0; k < r.K; ++k) p.picked[k] = gather(of_logits ? p.logits : p.scores, p.chosen + k * LANES);
  weigh(r, p.picked);
  for (int i = 0; i < live; ++i) {
    const int64_t t = begin + i;
    float log_sum = most[i] + std::log(sum[i]);
    if (!finite[i]) {
      ++sums.nonfinite;
      log_sum = log_sum_of_row(p.logits, r.E, i, most[i], log_sum);
    }
    const float kept[kNumKept] = {most[i], inverse[i], log_sum, inverse_total[i]};
    for (int which = 0; which < kNumKept; ++which) out.kept[which * r.T + t] = kept[which];
    for (int64_t k = 0; k < r.K; ++k) {
      const int32_t expert = p.chosen[k * LANES + i];
      out.chosen[t * r.K + k] = expert;
      out.weights[t * r.K + k] = p.picked[k][i];
      out.experts[t * r.K + k] = real[i] ? expert : -1;
      if (real[i]) ++sums.counts[expert];
    }
    if (!real[i]) continue;
    ++sums.counts[r.E + p.chosen[i]];
    sums.log_sum += log_sum;
    sums.square_sum += static_cast<double>(log_sum) * log_sum;
  }
}

template <Scores S>
void route_segment(const Routing& r, const Panels& p, const float* logits, const bool* mask, const float* bias,
                   const Segment& segment, const Outputs& out, Sums& sums) {
  std::fill(p.sums, p.sums + r.E, vf{});
  std::fill(sums.counts, sums.counts + 2 * r.E, 0);
  for (int64_t t = segment.begin; t < segment.end; t += LANES) {
    const int live = static_cast<int>(std::min<int64_t>(LANES, segment.end - t));
    read_panel(logits + t * r.E, r.E, live, p.logits);
    route_panel<S>(r, p, mask, bias, t, live, out, sums);
  }
  for (int64_t e = 0; e < r.E; ++e) sums.scores[e] = sum_of_lanes(p.sums[e]);
}

// The segments' sums, added up in their order.
void add_segments(const Routing& r, const std::vector<Segment>& segments, const std::vector<Sums>& sums,
                  float* scores, int64_t* counts, int64_t* first) {
  const int64_t groups = groups_of(r), per_group = (r.group + kSegment - 1) / kSegment;
  run_range(groups, std::max<int64_t>(1, (1 << 14) / r.E), [&](int64_t from, int64_t to) {
    for (int64_t g = from; g < to; ++g) {
      const size_t start = std::min<size_t>(g * per_group, segments.size());
      const size_t stop = std::min<size_t>(start + per_group, segments.size());
      for (int64_t e = 0; e < r.E; ++e) {
        double total = 0;
        int64_t all = 0, firsts = 0;
        for (size_t i = start; i < stop; ++i) {
          total += sums[i].scores[e];
          all += sums[i].counts[e];
          firsts += sums[i].counts[r.E + e];
        }
        scores[g * r.E + e] = static_cast<float>(total);
        counts[g * r.E + e] = all;
        first[g * r.E + e] = firsts;
      }
    }
  });
}

using Routed = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                          at::Tensor, at::Tensor, at::Tensor>;

Routed route(const at::Tensor& logits, const Maybe& mask, const Maybe& bias, int64_t num_selected,
             c10::string_view score_name, c10::string_view weight_name, double scale, double least, bool by_logits,
             int64_t group_size) {
  const Routing r = check_routing(logits, mask, bias, num_selected, score_name, weight_name, scale, least, by_logits,
                                  group_size);
  const auto longs = logits.options().dtype(at::kLong);
  const int64_t groups = groups_of(r);
  auto weights = at::empty({r.T, r.K}, logits.options()), experts = at::empty({r.T, r.K}, longs);
  auto chosen = at::empty({r.T, r.K}, logits.options().dtype(at::kInt));
  auto kept = at::empty({kNumKept, r.T}, logits.options());
  auto score_sums = at::empty({groups, r.E}, logits.options());
  auto counts = at::empty({groups, r.E}, longs), first = at::empty({groups, r.E}, longs);
  auto log_sum = at::empty({}, logits.options()), square_sum = at::empty({}, logits.options());
  auto nonfinite = at::empty({}, longs);
  const Outputs out{weights.mutable_data_ptr<float>(), experts.mutable_data_ptr<int64_t>(),
                    chosen.mutable_data_ptr<int32_t>(), kept.mutable_data_ptr<float>()};
  const float* x = logits.const_data_ptr<float>();
  const bool* real = mask ? mask->const_data_ptr<bool>() : nullptr;
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const auto segments = segments_of(r);
  const int64_t size = static_cast<int64_t>(segments.size());
  const int threads = threads_for(size);
  Scratch panels(floats_per_thread(r) * threads * sizeof(float));
  Scratch parts(static_cast<size_t>(std::max<int64_t>(size, 1)) * 3 * r.E * sizeof(float));
  std::vector<Sums> sums(segments.size());
  run_tasks(size, threads, [&](int64_t i, int thread) {
    sums[i].scores = parts.as<float>() + i * 3 * r.E;
    sums[i].counts = reinterpret_cast<int32_t*>(sums[i].scores + r.E);
    const Panels own = panels_at(panels.as<float>() + floats_per_thread(r) * thread, r);
    const auto run = r.scores == Scores::softmax   ? route_segment<Scores::softmax>
                     : r.scores == Scores::sigmoid ? route_segment<Scores::sigmoid>
                                                   : route_segment<Scores::identity>;
    run(r, own, x, real, biases, segments[i], out, sums[i]);
  });
  add_segments(r, segments, sums, score_sums.mutable_data_ptr<float>(), counts.mutable_data_ptr<int64_t>(),
               first.mutable_data_ptr<int64_t>());
  double plain = 0, squares = 0;
  int64_t strange = 0;
  for (const Sums& one : sums) {
    plain += one.log_sum;
    squares += one.square_sum;
    strange += one.nonfinite;
  }
  *log_sum.mutable_data_ptr<float>() = static_cast<float>(plain);
  *square_sum.mutable_data_ptr<float>() = static_cast<float>(squares);
  *nonfinite.mutable_data_ptr<int64_t>() = strange;
  return {weights, experts, score_sums, log_sum, square_sum, nonfinite, counts, first, chosen, kept};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "route(Tensor logits, Tensor? mask, Tensor? bias, int num_selected, str scores, str weights, float scale, "
      "float least, bool by_logits, int group_size) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("route", route); }

}  // namespace gatewright
