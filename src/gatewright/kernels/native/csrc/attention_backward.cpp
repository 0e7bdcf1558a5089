// Causal attention, backward: the probabilities are computed again, a block of keys against all queries that saw it.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "attention.h"

namespace gatewright {
namespace {

// Scores stand on their side here, keys by queries: a row's log-sum-exp is then a vector over columns, both sums over
// queries (of dK and dV) are products as they are, and no matrix of scores is ever turned.
template <class T>
class Backward {
 public:
  Backward(const at::Tensor& due, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
           const at::Tensor& lse, const AttentionSizes& s, const at::Tensor& dq, const at::Tensor& dk,
           const at::Tensor& dv)
      : due_(due), q_(q), k_(k), v_(v), out_(out), dq_(dq), dk_(dk), dv_(dv), lse_(lse.const_data_ptr<float>()), s_(s),
        keys_(s.P > kLong ? 2 * kTile : kTile), queries_(round_up(s.S, kTile)), padded_(round_up(s.P, keys_)),
        ld_(spread(queries_)), ld_keys_(padded_ + 16) {}

  void run() {
    const int64_t tasks = s_.B * s_.G;
    run_tasks(tasks, threads_for(tasks), [&](int64_t task, int) { task_of(task / s_.G, task % s_.G); });
  }

 private:
  // Beyond so many keys, more of them share a reading of all queries; below, less lies above the diagonal.
  static constexpr int64_t kLong = 512;
  static constexpr int64_t kWide = kChunk + 16;

  // Everything of one head of keys: of the keys, then of each head of queries in turn.
  struct Room {
    T *keys, *values, *keys_aside, *queries, *due, *powers, *slopes;
    uint32_t *queries_aside, *due_aside, *query_units, *due_units, *slope_units;
    float *dq, *dk, *dv, *lse, *delta, *scores, *lifts;
  };

  Scratch lay(Room& room) const {
    size_t size = 0;
    char* base = nullptr;
    auto take = [&]<class X>(X*& to, int64_t count) {
      to = reinterpret_cast<X*>(base + size);
      size += round_up(count * sizeof(X), 64);
    };
    auto all = [&] {
      const int64_t d = s_.d, units = d / per_unit<T>;
      take(room.keys, padded_ * d);
      take(room.values, padded_ * d);
      take(room.keys_aside, d * ld_keys_);
      take(room.queries, queries_ * d);
      take(room.due, queries_ * d);
      take(room.queries_aside, units * ld_);
      take(room.due_aside, units * ld_);
      take(room.dq, d * ld_);
      take(room.dk, padded_ * d);
      take(room.dv, padded_ * d);
      take(room.lse, queries_);
      take(room.delta, queries_);
      take(room.scores, keys_ * kWide);
      take(room.lifts, keys_ * kWide);
      take(room.powers, is_bf16<T> ? keys_ * kWide : 0);
      take(room.slopes, is_bf16<T> ? keys_ * kWide : 0);
      take(room.slope_units, is_bf16<T> ? keys_ / 2 * kWide : 0);
      take(room.query_units, is_bf16<T> ? queries_ / 2 * d : 0);
      take(room.due_units, is_bf16<T> ? queries_ / 2 * d : 0);
    };
    all();
    Scratch scratch(size);
    base = scratch.as<char>();
    size = 0;
    all();
    return scratch;
  }

  void task_of(int64_t b, int64_t g) {
    Room room;
    const Scratch scratch = lay(room);
    const int64_t d = s_.d;
    copy_rows(head_of<T>(k_, b, g), 0, s_.P, padded_, d, room.keys);
    copy_rows(head_of<T>(v_, b, g), 0, s_.P, padded_, d, room.values);
    aside(room.keys, room);
    for (int64_t own = 0; own < s_.shared(); ++own) head(b, g * s_.shared() + own, own == 0, room);
    const Head<T> dk = own_head_of<T>(dk_, b, g), dv = own_head_of<T>(dv_, b, g);
    for (int64_t i = 0; i < s_.P; ++i) {
      scaled_row(room.dk + i * d, s_.scale(), d, dk.row(i));
      scaled_row(room.dv + i * d, 1.0f, d, dv.row(i));
    }
    end_of_multiplying();
  }

  // Keys as [d, P]: bf16 first in pairs of rows, whose units turned are numbers side by side.
  void aside(const T* keys, const Room& room) const {
    const int64_t d = s_.d, units = padded_ / per_unit<T>;
    const uint32_t* paired = units_of(keys, d, padded_, d, reinterpret_cast<uint32_t*>(room.dk));
    transpose_units(paired, d, units, d, reinterpret_cast<uint32_t*>(room.keys_aside), ld_keys_ / per_unit<T>);
  }

  void head(int64_t b, int64_t h, bool first, const Room& room) const {
    const int64_t d = s_.d;
    const Head<const T> due = head_of<T>(due_, b, h), out = head_of<T>(out_, b, h);
    copy_rows(head_of<T>(q_, b, h), 0, s_.S, queries_, d, room.queries);
    copy_rows(due, 0, s_.S, queries_, d, room.due);
    turn_rows(room.queries, queries_, d, room.queries_aside, ld_);
    turn_rows(room.due, queries_, d, room.due_aside, ld_);
    const uint32_t* queries = units_of(room.queries, d, queries_, d, room.query_units);
    const uint32_t* dues = units_of(room.due, d, queries_, d, room.due_units);
    for (int64_t i = 0; i < queries_; ++i) {
      const bool there = i < s_.S;
      room.lse[i] = there ? lse_[(b * s_.H + h) * s_.S + i] * kLog2E : -kNone;  // rows behind the last weigh nothing
      room.delta[i] = there ? dot(due.row(i), out.row(i), d) : 0.0f;
    }
    for (int64_t key = 0; key < padded_; key += keys_) {
      bool begun = !first;
      const int64_t from = std::max<int64_t>(0, key - s_.past) / kTile * kTile;
      for (int64_t at = from; at < queries_; at += kChunk) {
        block(key, at, std::min(kChunk, queries_ - at), begun, queries, dues, room);
        begun = true;
      }
    }
    // dQ stands on its side: turned back over what is not needed any more.
    float* turned = reinterpret_cast<float*>(room.scores);
    const Head<T> dq = own_head_of<T>(dq_, b, h);
    const int64_t ld = round_up(d, 16);
    for (int64_t i = 0; i < s_.S; i += kTile) {
      transpose_units(reinterpret_cast<const uint32_t*>(room.dq + i), ld_, d, kTile, reinterpret_cast<uint32_t*>(turned), ld);
      for (int64_t r = 0; r < std::min(kTile, s_.S - i); ++r) scaled_row(turned + r * ld, s_.scale(), d, dq.row(i + r));
    }
  }

  // keys_ keys from `key` on against `wide` queries from `at` on.
  void block(int64_t key, int64_t at, int64_t wide, bool add, const uint32_t* queries, const uint32_t* dues,
             const Room& room) const {
    const int64_t d = s_.d;
    multiply(keys_, wide, d, room.keys + key * d, d, room.queries_aside + at, ld_, room.scores, kWide, false);
    multiply(keys_, wide, d, room.values + key * d, d, room.due_aside + at, ld_, room.lifts, kWide, false);
    slopes(key, at, wide, room);
    const T *powers, *slopes;
    const uint32_t* units;
    if constexpr (is_bf16<T>) {
      powers = room.powers, slopes = room.slopes, units = room.slope_units;
    } else {
      powers = room.scores, slopes = room.lifts, units = reinterpret_cast<const uint32_t*>(room.lifts);
    }
    const int64_t row = at / per_unit<T> * d;
    multiply(keys_, d, wide, powers, kWide, dues + row, d, room.dv + key * d, d, add);
    multiply(keys_, d, wide, slopes, kWide, queries + row, d, room.dk + key * d, d, add);
    multiply(d, wide, keys_, room.keys_aside + key, ld_keys_, units, kWide, room.dq + at, ld_, key > 0);
  }

  // Probabilities and the gradients of scores, in place or, in bf16, beside them.
  void slopes(int64_t key, int64_t at, int64_t wide, const Room& room) const {
    const float by = s_.scale() * kLog2E;
    const vi lane = lane_numbers();
    for (int64_t n = 0; n < keys_; n += 2) {
      for (int64_t j = 0; j < wide; j += LANES) {
        const vf lse = load(room.lse + at + j), delta = load(room.delta + at + j);
        vf slope[2];
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t place = (n + i) * kWide + j;
          vf power = exp2_of(load(room.scores + place) * by - lse);
          // A query sees keys up to its own.
          const int64_t hidden = key + n + i - s_.past - at - j;
          slope[i] = (load(room.lifts + place) - delta) * power;
          if (hidden > 0) {
            const vi seen = lane >= (int32_t)std::min<int64_t>(hidden, LANES);
            power = only(seen, power);
            slope[i] = only(seen, slope[i]);
          }
          if constexpr (is_bf16<T>) {
            store_as(room.powers + place, power);
            store_as(room.slopes + place, slope[i]);
          } else {
            store(room.scores + place, power);
            store(room.lifts + place, slope[i]);
          }
        }
        if constexpr (is_bf16<T>)
          store(reinterpret_cast<int32_t*>(room.slope_units + n / 2 * kWide + j),
                (rounded(slope[0]) >> 16 & 0xffff) | (rounded(slope[1]) & (int32_t)0xffff0000));
      }
    }
  }

  const at::Tensor &due_, &q_, &k_, &v_, &out_, &dq_, &dk_, &dv_;
  const float* lse_;
  const AttentionSizes s_;
  const int64_t keys_, queries_, padded_, ld_, ld_keys_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& due, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& out, const at::Tensor& lse,
                                                                  int64_t past) {
  const AttentionSizes s = check_attention(q, k, v, past, false);
  const auto kind = q.scalar_type();
  TORCH_CHECK_VALUE(due.sizes() == q.sizes() && out.sizes() == q.sizes() && due.scalar_type() == kind &&
                        out.scalar_type() == kind && due.device().is_cpu() && out.device().is_cpu(),
                    "attention: gradient ", due.sizes(), " and output ", out.sizes(), " of queries ", q.sizes());
  TORCH_CHECK_VALUE(lse.sizes() == at::IntArrayRef({s.B, s.H, s.S}) && lse.is_contiguous() &&
                        lse.scalar_type() == at::kFloat && lse.device().is_cpu(),
                    "attention: log-sum-exps ", lse.sizes());
  const at::Tensor dq = empty_heads(s.B, s.H, s.S, s.d, kind), dk = empty_heads(s.B, s.G, s.P, s.d, kind);
  const at::Tensor dv = empty_heads(s.B, s.G, s.P, s.d, kind);
  if (q.numel() == 0) {
    dk.zero_();
    dv.zero_();
    return {dq, dk, dv};
  }
  const at::Tensor came = with_rows(due), queries = with_rows(q), keys = with_rows(k), values = with_rows(v),
                   found = with_rows(out);
  with_kind(kind, [&]<class T>() {
    Backward<T>(came, queries, keys, values, found, lse, s, dq, dk, dv).run();
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "attention_backward(Tensor due, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int past) -> "
      "(Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("attention_backward", attention_backward); }

}  // namespace gatewright
