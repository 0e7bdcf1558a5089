// Checks before anything is read, the tasks that rows fall into, and combining.
#include "experts.h"

#include <c10/util/Exception.h>

namespace gatewright {
namespace {

void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " ", tensor.sizes(), "; allowed: ", shape);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " is not contiguous; call .contiguous()");
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " is on ", tensor.device(), "; the native kernels run on the CPU");
}

void check_indices(const at::Tensor& values, int64_t size, int64_t least, int64_t end, const char* name) {
  const int64_t* first = data<int64_t>(values);
  int64_t low = least, high = least;
  for (int64_t i = 0; i < size; ++i) {
    low = std::min(low, first[i]);
    high = std::max(high, first[i]);
  }
  TORCH_CHECK_VALUE(size == 0 || (low >= least && high < end), name, " hold ", low, " to ", high, "; allowed: ", least,
                    " to ", end - 1);
}

}  // namespace

Sizes check(const Inputs& in, bool gated, bool quantised) {
  TORCH_CHECK_VALUE(in.x.dim() == 2 && in.slots.dim() == 2 && in.w_in.dim() == 3 && in.token_ids.dim() == 1,
                    "x [T, D], slots [T, K], w_in [E, H, D] and token_ids [M] have 2, 2, 3 and 1 axes");
  Sizes s{in.x.size(0), in.x.size(1), in.w_in.size(1), 0, in.w_in.size(0), in.slots.size(1), 0};
  s.F = gated ? s.H / 2 : s.H;
  check_shape(in.x, {s.T, s.D}, "x");
  check_shape(in.combine_weights, {s.T, s.K}, "combine_weights");
  check_shape(in.w_in, {s.E, gated ? 2 * s.F : s.F, s.D}, "w_in");
  check_shape(in.w_down, {s.E, s.D, s.F}, "w_down");
  check_shape(in.token_ids, {in.token_ids.size(0)}, "token_ids");
  check_shape(in.counts, {s.E}, "counts");
  check_shape(in.slots, {s.T, s.K}, "slots");
  if (in.b_in) check_shape(*in.b_in, {s.E, s.H}, "b_in");
  if (in.b_down) check_shape(*in.b_down, {s.E, s.D}, "b_down");
  if (in.hidden_scale) check_shape(*in.hidden_scale, {in.token_ids.size(0), s.F}, "hidden_scale");
  const auto kind = in.x.scalar_type(), kept = in.w_in.scalar_type();
  TORCH_CHECK_VALUE(kind == at::kFloat || kind == at::kBFloat16, "x is ", kind, "; allowed: float32, bfloat16");
  const auto biases = kept == at::kChar ? at::kFloat : kept;
  TORCH_CHECK_VALUE(kept == at::kFloat || kept == kind || (quantised && kept == at::kChar), "w_in is ", kept, " for x ",
                    kind, "; allowed: float32 or ", kind, quantised ? ", or int8" : "");
  TORCH_CHECK_VALUE(in.w_down.scalar_type() == kept && (!in.b_in || in.b_in->scalar_type() == biases) &&
                        (!in.b_down || in.b_down->scalar_type() == biases),
                    "weights and biases have different dtypes");
  TORCH_CHECK_VALUE(in.combine_weights.scalar_type() == at::kFloat, "combine_weights are not float32");
  TORCH_CHECK_VALUE(!in.hidden_scale || in.hidden_scale->scalar_type() == kind, "hidden_scale is not of x's dtype");
  TORCH_CHECK_VALUE(in.token_ids.scalar_type() == at::kLong && in.counts.scalar_type() == at::kLong &&
                        in.slots.scalar_type() == at::kLong, "token_ids, counts and slots are int64");
  check_indices(in.counts, s.E, 0, in.token_ids.size(0) + 1, "counts");
  for (int64_t e = 0; e < s.E; ++e) s.M += data<int64_t>(in.counts)[e];
  TORCH_CHECK_VALUE(s.M <= in.token_ids.size(0), "counts sum to ", s.M, " for ", in.token_ids.size(0), " token_ids");
  check_indices(in.token_ids, s.M, 0, std::max<int64_t>(s.T, 1), "token_ids");
  check_indices(in.slots, s.T * s.K, -1, s.M, "slots");
  return s;
}

void check_scales(const Inputs& in, const Maybe& scale_in, const Maybe& scale_down, const Sizes& s) {
  const bool quantised = in.w_in.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(scale_in.has_value() == quantised && scale_down.has_value() == quantised,
                    "scales belong to int8 weights, one for either matrix");
  if (!quantised) return;
  check_shape(*scale_in, {s.E, s.H}, "scale_in");
  check_shape(*scale_down, {s.E, s.D}, "scale_down");
  TORCH_CHECK_VALUE(scale_in->scalar_type() == at::kFloat && scale_down->scalar_type() == at::kFloat,
                    "scales are not float32");
}

std::vector<Task> tasks_of(const at::Tensor& counts, int64_t most) {
  std::vector<Task> tasks;
  int64_t begin = 0;
  for (int64_t e = 0; e < counts.size(0); ++e) {
    const int64_t count = data<int64_t>(counts)[e], parts = (count + most - 1) / most;
    // Parts of equal size, in whole steps of 8 rows.
    const int64_t rows = parts ? round_up((count + parts - 1) / parts, 8) : 0;
    for (int64_t part = 0, at = 0; at < count; ++part, at += rows)
      tasks.push_back({e, begin + at, begin + std::min(at + rows, count), part});
    begin += count;
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; });
  return tasks;
}

void weights_of_rows(const Inputs& in, const Sizes& s, float* out) {
  const int64_t* slots = data<int64_t>(in.slots);
  const float* weights = data<float>(in.combine_weights);
  for (int64_t row = 0; row < s.M; ++row) out[row] = 0.0f;
  for (int64_t i = 0; i < s.T * s.K; ++i)
    if (slots[i] >= 0) out[slots[i]] = weights[i];
}

template <class T>
void gather_sum(const T* rows, const at::Tensor& slots, const Sizes& s, T* y) {
  const int64_t* places = data<int64_t>(slots);
  const int64_t D = s.D, K = s.K;
  run_range(s.T, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(D);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = places[t * K + k];
        if (row < 0) continue;
        const T* from = rows + row * D;
        for (int64_t j = 0; j < D; ++j) sums[j] += widen(from[j]);
      }
      for (int64_t j = 0; j < D; ++j) y[t * D + j] = narrow<T>(sums[j]);
    }
  });
}

template void gather_sum<float>(const float*, const at::Tensor&, const Sizes&, float*);
template void gather_sum<bf16>(const bf16*, const at::Tensor&, const Sizes&, bf16*);

}  // namespace gatewright
