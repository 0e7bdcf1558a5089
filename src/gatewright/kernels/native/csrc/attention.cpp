// Causal attention, forward: blocks of queries against the keys up to their own, softmax as the keys pass by.
#include "attention.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

namespace gatewright {

AttentionSizes check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t past,
                               bool mixed) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v have 4 axes");
  AttentionSizes s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), past};
  TORCH_CHECK_VALUE(k.sizes() == v.sizes() && k.size(0) == s.B && k.size(3) == s.d, "attention: q ", q.sizes(), ", k ",
                    k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK_VALUE(s.G > 0 && s.H % s.G == 0, "attention: ", s.H, " heads over ", s.G, " of keys");
  TORCH_CHECK_VALUE(past >= 0 && s.P == past + s.S, "attention: ", s.P, " keys for ", s.S, " queries behind ", past);
  TORCH_CHECK_VALUE(s.d >= 2 && s.d % 2 == 0 && s.d <= kMostWide, "attention: head_dim ", s.d,
                    "; allowed: even numbers up to ", kMostWide);
  for (const at::Tensor* one : {&q, &k, &v}) {
    const auto kind = one->scalar_type();
    TORCH_CHECK_VALUE(one->device().is_cpu() && (kind == at::kFloat || kind == at::kBFloat16), "attention: takes float32 "
                      "and bfloat16 on the CPU, not ", kind, " on ", one->device());
  }
  TORCH_CHECK_VALUE(k.scalar_type() == v.scalar_type() && (mixed || q.scalar_type() == k.scalar_type()),
                    "attention: q, k and v have different dtypes");
  return s;
}

namespace {

// Queries of one task: keys are packed once for all of them.
constexpr int64_t kTask = 256;

template <class T>
class Forward {
 public:
  Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionSizes& s, const at::Tensor& out,
          const at::Tensor& lse)
      : q_(q), k_(k), v_(v), out_(out), lse_(lse.mutable_data_ptr<float>()), s_(s) {}

  void run() {
    const int64_t parts = (s_.S + kTask - 1) / kTask, tasks = parts * s_.B * s_.G;
    // The last queries have the most keys: their tasks come first.
    run_tasks(tasks, threads_for(tasks), [&](int64_t task, int) {
      const int64_t head = task % (s_.B * s_.G), part = parts - 1 - task / (s_.B * s_.G);
      task_of(head / s_.G, head % s_.G, part * kTask, std::min(s_.S, (part + 1) * kTask));
    });
  }

 private:
  static constexpr int64_t kWide = kChunk + 16;  // row length of scores

  void task_of(int64_t b, int64_t g, int64_t begin, int64_t end) {
    const int64_t d = s_.d, keys = s_.past + end, padded = round_up(keys, kTile), ld = spread(padded);
    Scratch rows(padded * d * sizeof(T)), turned(d / per_unit<T> * ld * 4), values(padded * d * sizeof(T));
    Scratch room((kTile * (2 * kWide + 2 * d)) * 4);
    copy_rows(head_of<T>(k_, b, g), 0, keys, padded, d, rows.template as<T>());
    turn_rows(rows.template as<T>(), padded, d, turned.as<uint32_t>(), ld);
    copy_rows(head_of<T>(v_, b, g), 0, keys, padded, d, rows.template as<T>());
    const uint32_t* units = units_of(rows.template as<T>(), d, padded, d, values.as<uint32_t>());
    for (int64_t own = 0; own < s_.shared(); ++own)
      for (int64_t first = begin; first < end; first += kTile)
        block(b, g * s_.shared() + own, first, std::min(kTile, end - first), turned.as<uint32_t>(), ld, units,
              room.as<float>());
    end_of_multiplying();
  }

  // Up to kTile queries of one head, from `first` on.
  void block(int64_t b, int64_t h, int64_t first, int64_t rows, const uint32_t* keys, int64_t ld, const uint32_t* values,
             float* scores) {
    const int64_t d = s_.d, end = s_.past + first + rows;
    float *out = scores + kTile * kWide, top[kTile], sum[kTile], shrink[kTile];
    T *powers = is_bf16<T> ? reinterpret_cast<T*>(out + kTile * d) : reinterpret_cast<T*>(scores);
    T* query = reinterpret_cast<T*>(out + kTile * (d + kWide));
    copy_rows(head_of<T>(q_, b, h), first, rows, kTile, d, query);
    std::fill_n(top, kTile, kNone);
    std::fill_n(sum, kTile, 0.0f);
    for (int64_t at = 0; at < end; at += kChunk) {
      const int64_t wide = round_up(std::min(kChunk, end - at), kTile);
      multiply(kTile, wide, d, query, d, keys + at, ld, scores, kWide, false);
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t seen = std::max<int64_t>(0, s_.past + first + std::min(i, rows - 1) + 1 - at);
        for (int64_t j = seen; j < wide; ++j) scores[i * kWide + j] = kNone;
      }
      for (int64_t i = 0; i < kTile; i += LANES) softmax(scores + i * kWide, wide, powers + i * kWide, top + i, sum + i, shrink + i);
      if (at)
        for (int64_t i = 0; i < kTile; ++i)
          if (shrink[i] != 1.0f) scaled_row(out + i * d, shrink[i], d, out + i * d);
      multiply(kTile, d, wide, powers, kWide, values + at / per_unit<T> * d, d, out, d, at > 0);
    }
    const Head<T> to = own_head_of<T>(out_, b, h);
    for (int64_t i = 0; i < kTile; i += LANES) store(shrink + i, load(top + i) * kLn2 + log2_of(load(sum + i)) * kLn2);
    for (int64_t i = 0; i < rows; ++i) {
      scaled_row(out + i * d, 1.0f / sum[i], d, to.row(first + i));
      lse_[(b * s_.H + h) * s_.S + first + i] = shrink[i];
    }
  }

  // LANES rows of scores into powers of 2 below their maxima (in `powers`), the maxima and sums carried on;
  // `shrink` is what earlier sums have to be multiplied by.
  void softmax(const float* scores, int64_t wide, T* powers, float* top, float* sum, float* shrink) const {
    const float by = s_.scale() * kLog2E;
    vf rows[LANES];
    for (int i = 0; i < LANES; ++i) {
      vf even = splat(kNone), odd = even;
      for (int64_t j = 0; j < wide; j += 2 * LANES) {
        even = highest(load(scores + i * kWide + j), even);
        odd = highest(load(scores + i * kWide + j + LANES), odd);
      }
      rows[i] = highest(even, odd);
    }
    transpose(rows);
    const vf before = load(top);
    vf now = rows[0];
    for (int i = 1; i < LANES; ++i) now = highest(now, rows[i]);
    now = highest(now * by, before);
    store(top, now);
    const vf less = exp2_of(before - now);
    store(shrink, less);
    for (int i = 0; i < LANES; ++i) {
      const vf own = splat(top[i]);
      vf even{}, odd{};
      for (int64_t j = 0; j < wide; j += 2 * LANES) {
        const vf a = exp2_of(load(scores + i * kWide + j) * by - own);
        const vf b = exp2_of(load(scores + i * kWide + j + LANES) * by - own);
        even += a;
        odd += b;
        store_as(powers + i * kWide + j, a);
        store_as(powers + i * kWide + j + LANES, b);
      }
      rows[i] = even + odd;
    }
    transpose(rows);
    vf total{};
    for (int i = 0; i < LANES; ++i) total += rows[i];
    store(sum, load(sum) * less + total);
  }

  const at::Tensor &q_, &k_, &v_, &out_;
  float* lse_;
  const AttentionSizes s_;
};

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     int64_t past) {
  const bool few = q.dim() == 4 && k.dim() == 4 && k.size(1) && q.size(2) * (q.size(1) / k.size(1)) <= kFewRows;
  const AttentionSizes s = check_attention(q, k, v, past, few);
  const at::Tensor out = empty_heads(s.B, s.H, s.S, s.d, q.scalar_type());
  const at::Tensor lse = pooled_empty({s.B, s.H, s.S}, at::kFloat);
  if (out.numel() == 0) return {out, lse};
  const at::Tensor queries = with_rows(q), keys = with_rows(k), values = with_rows(v);
  if (few) attend_few(queries, keys, values, s, out, lse);
  else with_kind(q.scalar_type(), [&]<class T>() { Forward<T>(queries, keys, values, s, out, lse).run(); });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, int past) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("attention_forward", attention_forward); }

}  // namespace gatewright
