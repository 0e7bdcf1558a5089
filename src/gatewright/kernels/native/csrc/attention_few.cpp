// Causal attention for the few queries of a decoding step: keys and values are read once, at the memory's pace.
#include "attention.h"

#include <vector>

namespace gatewright {
namespace {

// Keys of one task, and of one block, whose scores are kept in between.
constexpr int64_t kSpan = 1024, kBlock = 64;

// What one task finds for one query row: maximum, sum and weighted values, of its own keys.
inline int64_t found_size(int64_t d) { return round_up(d, LANES) + LANES; }

// out[n] = query . keys[at + n] for LANES keys; those behind `count` repeat the last.
template <class K>
vf dots(const float* query, Head<const K> keys, int64_t at, int64_t count, int64_t d) {
  vf sums[LANES];
  float rest[LANES] = {};
  for (int64_t n = 0; n < LANES; ++n) {
    const K* key = keys.row(at + std::min(n, count - 1));
    vf sum{};
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) sum += load(query + j) * load_as(key + j);
    for (; j < d; ++j) rest[n] = std::fma(query[j], widen(key[j]), rest[n]);
    sums[n] = sum;
  }
  transpose(sums);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0] + load(rest);
}

// own[j] += sum over n of by[n] * values[at + n][j], kVectors vectors of a row at a time in registers.
template <int kVectors, class K>
void add_rows(const float* by, Head<const K> values, int64_t at, int64_t count, int64_t j, float* own) {
  vf sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = load(own + j + i * LANES);
  for (int64_t n = 0; n < count; ++n) {
    const K* value = values.row(at + n) + j;
    for (int i = 0; i < kVectors; ++i) sums[i] += load_as(value + i * LANES) * by[n];
  }
  for (int i = 0; i < kVectors; ++i) store(own + j + i * LANES, sums[i]);
}

// `rows` queries (heads of one group, then positions) against keys begin .. end; `found` [rows][found_size].
template <class K>
void span_of(const float* query, int64_t rows, Head<const K> keys, Head<const K> values, const AttentionSizes& s,
             int64_t begin, int64_t end, float* found) {
  const int64_t d = s.d, size = found_size(d);
  const float by = s.scale() * kLog2E;
  float scores[kFewRows][kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    std::fill_n(found + r * size, size, 0.0f);
    found[r * size + d] = kNone;
  }
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    for (int64_t n = 0; n < count; n += LANES)
      for (int64_t r = 0; r < rows; ++r) store(scores[r] + n, dots(query + r * d, keys, at + n, count - n, d) * by);
    for (int64_t r = 0; r < rows; ++r) {
      float *own = found + r * size, *top = own + d, *sum = own + d + 1;
      const int64_t seen = std::clamp<int64_t>(s.past + r % s.S + 1 - at, 0, count);
      for (int64_t n = seen; n < kBlock; ++n) scores[r][n] = kNone;
      if (seen == 0) continue;
      vf most = splat(*top);
      for (int64_t n = 0; n < kBlock; n += LANES) most = highest(load(scores[r] + n), most);
      float parts[LANES], now = *top;
      store(parts, most);
      for (float one : parts) now = one > now ? one : now;
      const float less = exp2_of(splat(*top - now))[0];
      vf total{};
      for (int64_t n = 0; n < kBlock; n += LANES) {
        const vf power = exp2_of(load(scores[r] + n) - now);
        total += power;
        store(scores[r] + n, power);
      }
      *sum = *sum * less + sum_of_lanes(total);
      *top = now;
      if (less != 1.0f) scaled_row(own, less, d, own);
      int64_t j = 0;
      for (; j + 4 * LANES <= d; j += 4 * LANES) add_rows<4>(scores[r], values, at, seen, j, own);
      for (; j + LANES <= d; j += LANES) add_rows<1>(scores[r], values, at, seen, j, own);
      for (; j < d; ++j)
        for (int64_t n = 0; n < seen; ++n) own[j] = std::fma(widen(values.row(at + n)[j]), scores[r][n], own[j]);
    }
  }
}

// Parts of one row together, in the order of keys.
template <class T>
void join(const float* found, int64_t parts, int64_t step, int64_t d, T* out, float* lse) {
  float top = kNone, sum = 0.0f;
  std::vector<float> all(d, 0.0f);
  for (int64_t part = 0; part < parts; ++part) top = std::max(top, found[part * step + d]);
  for (int64_t part = 0; part < parts; ++part) {
    const float* own = found + part * step;
    if (own[d] == kNone && own[d + 1] == 0.0f) continue;  // no key of this part is seen
    const float less = exp2_of(splat(own[d] - top))[0];
    sum += own[d + 1] * less;
    for (int64_t j = 0; j < d; ++j) all[j] += own[j] * less;
  }
  scaled_row(all.data(), 1.0f / sum, d, out);
  *lse = top * kLn2 + std::log(sum);
}

}  // namespace

void attend_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionSizes& s,
                const at::Tensor& out, const at::Tensor& lse) {
  const int64_t rows = s.shared() * s.S, parts = (s.P + kSpan - 1) / kSpan, size = found_size(s.d);
  const int64_t heads = s.B * s.G, tasks = heads * parts;
  Scratch all(tasks * rows * size * 4);
  float* found = all.as<float>();
  run_tasks(tasks, threads_for(tasks), [&](int64_t task, int) {
    const int64_t head = task / parts, part = task % parts, b = head / s.G, g = head % s.G;
    std::vector<float> query(rows * s.d);
    with_kind(q.scalar_type(), [&]<class T>() {
      for (int64_t r = 0; r < rows; ++r)
        scaled_row(head_of<T>(q, b, g * s.shared() + r / s.S).row(r % s.S), 1.0f, s.d, query.data() + r * s.d);
    });
    with_kind(k.scalar_type(), [&]<class K>() {
      span_of(query.data(), rows, head_of<K>(k, b, g), head_of<K>(v, b, g), s, part * kSpan,
              std::min(s.P, (part + 1) * kSpan), found + task * rows * size);
    });
  });
  float* sums = lse.mutable_data_ptr<float>();
  with_kind(q.scalar_type(), [&]<class T>() {
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = head / s.G, h = head % s.G * s.shared() + r / s.S;
        join(found + (head * parts * rows + r) * size, parts, rows * size, s.d, own_head_of<T>(out, b, h).row(r % s.S),
             sums + (b * s.H + h) * s.S + r % s.S);
      }
  });
}

}  // namespace gatewright
