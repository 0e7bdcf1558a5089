// What a router's forward and backward pass share: sizes, words as numbers, and the cut into segments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "lanes.h"
#include "pool.h"
#include "tasks.h"

namespace gatewright {

using Maybe = std::optional<at::Tensor>;

enum class Scores { softmax, sigmoid, identity };
enum class Weights { raw, renormalised, softmax_selected };

struct Routing {
  int64_t T, E, K, group;  // `group` tokens per group, the last may be smaller
  Scores scores;
  Weights weights;
  float scale, least;  // what the sum of the chosen scores is taken for at least
  bool by_logits;      // choose by logits, whatever the scores are
};

// Raises where a shape, a dtype or a word does not fit.
Routing check_routing(const at::Tensor& logits, const Maybe& mask, const Maybe& bias, int64_t num_selected,
                      c10::string_view scores, c10::string_view weights, double scale, double least, bool by_logits,
                      int64_t group_size);

// Tokens of one group that one task takes. The cut depends on T and the groups alone, never on threads.
struct Segment {
  int64_t group, begin, end;
};
constexpr int64_t kSegment = 256;
std::vector<Segment> segments_of(const Routing& r);

inline int64_t groups_of(const Routing& r) { return r.T == 0 ? 1 : (r.T + r.group - 1) / r.group; }

// Which lanes hold a token that is not padding; `mask` may be null.
inline vi real_lanes(const bool* mask, int64_t begin, int live) {
  vi real{};
  for (int i = 0; i < live; ++i) real[i] = !mask || mask[begin + i] ? -1 : 0;
  return real;
}

// Values of one expert per lane.
inline vf gather(const float* panel, const int32_t* experts) {
  vf out;
  for (int i = 0; i < LANES; ++i) out[i] = panel[experts[i] * LANES + i];
  return out;
}

// softmax over `count` vectors, in place.
inline void softmax(vf* values, int64_t count) {
  vf most = values[0], sum{};
  for (int64_t k = 1; k < count; ++k) most = where(values[k] > most, values[k], most);
  for (int64_t k = 0; k < count; ++k) sum += values[k] = exp(values[k] - most);
  for (int64_t k = 0; k < count; ++k) values[k] /= sum;
}

// What the forward pass leaves for the backward one, as rows of [4, T].
enum Kept { kMost, kInverse, kLogSum, kInverseTotal, kNumKept };

}  // namespace gatewright
