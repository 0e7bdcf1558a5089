// What the passes of causal attention share: strided heads, powers of 2 in vectors, copies of rows into the caches.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "blocks.h"
#include "lanes.h"
#include "numbers.h"
#include "pool.h"
#include "tasks.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace gatewright {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kNone = -std::numeric_limits<float>::infinity();
// Rows that a block has at least (kernels are generated for few sizes), and the most columns of scores at a time.
constexpr int64_t kTile = 32, kChunk = 256;
constexpr int64_t kMostWide = 256;  // of head_dim

// Sizes of a call: queries [B, H, S, d] at positions past .. past + S - 1, keys and values [B, G, P, d].
struct AttentionSizes {
  int64_t B, H, G, S, P, d, past;
  int64_t shared() const { return H / G; }  // heads that one head of keys serves
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }
};

// Raises where the three do not fit each other; `mixed` lets keys and values have another dtype than queries.
AttentionSizes check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t past, bool mixed);

// A tensor whose last axis is contiguous: itself, or a copy.
inline at::Tensor with_rows(const at::Tensor& x) { return x.dim() && x.stride(-1) == 1 ? x : x.contiguous(); }

// Fresh [B, heads, S, d] that lies as [B, S, heads, d]: what joins the heads again needs no copy.
inline at::Tensor empty_heads(int64_t B, int64_t heads, int64_t S, int64_t d, at::ScalarType kind) {
  at::AutoDispatchBelowADInplaceOrView unseen;  // a result of ours, no view that autograd should follow
  return pooled_empty({B, S, heads, d}, kind).transpose(1, 2);
}

// One head of [B, heads, S, d]: `row(i)` is its i-th row.
template <class T>
struct Head {
  T* first;
  int64_t stride;
  T* row(int64_t i) const { return first + i * stride; }
};

template <class T>
Head<const T> head_of(const at::Tensor& x, int64_t b, int64_t h) {
  return {x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1), x.stride(2)};
}
template <class T>
Head<T> own_head_of(const at::Tensor& x, int64_t b, int64_t h) {
  return {x.mutable_data_ptr<T>() + b * x.stride(0) + h * x.stride(1), x.stride(2)};
}

// 2^x for x <= 0 or so, relative error below 2e-7; below -125 it is 0; NaN stays NaN.
inline vf exp2_of(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vi low = x < -125.0f;
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = r * 1.32647e-3f + 9.67151e-3f;  // a fit on [-1/2, 1/2] of relative error 1e-7
  p = p * r + 5.550734e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
  return (vf)((vi)(p * (vf)(((vi)shifted << 23) + 0x3f800000)) & ~low);
}

// log2 of a positive normal number, absolute error below 1e-6 of it or of 1.
inline vf log2_of(vf x) {
  const vi bits = (vi)x - 0x3f3504f3;  // sqrt(1/2): the rest lies around 1
  const vi power = bits >> 23;
  const vf m = (vf)((bits & 0x7fffff) + 0x3f3504f3);
  const vf t = (m - 1.0f) / (m + 1.0f), u = t * t;
  vf p = u * (1.0f / 9.0f) + 1.0f / 7.0f;
  p = p * u + 1.0f / 5.0f;
  p = p * u + 1.0f / 3.0f;
  p = p * u + 1.0f;
  const vf found = __builtin_convertvector(power, vf) + p * t * (2.0f * kLog2E);
  return where(x == x, found, x);
}

inline vf highest(vf a, vf b) { return where(a > b, a, b); }

// Bits of a number rounded to bf16, in the upper half of each lane; the lower half is left over.
inline vi rounded(vf x) {
  const vi bits = (vi)x;
  return where(x == x, bits + 0x7fff + ((bits >> 16) & 1), splat((int32_t)0x7fc00000));
}

typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint16_t vhu __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline void store_as(float* to, vf x) { store(to, x); }
inline void store_as(bf16* to, vf x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  *reinterpret_cast<vhu*>(to) = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  *reinterpret_cast<vhu*>(to) = __builtin_convertvector(rounded(x) >> 16 & 0xffff, vh);
#endif
}
inline vf load_as(const float* from) { return load(from); }
inline vf load_as(const bf16* from) {
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vhu*>(from), vi) << 16);
}

// to[j] = from[j] * by over d numbers.
template <class To, class From>
inline void scaled_row(const From* from, float by, int64_t d, To* to) {
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES) store_as(to + j, load_as(from + j) * by);
  for (; j < d; ++j) to[j] = narrow<To>(widen(from[j]) * by);
}

template <class A, class B>
inline float dot(const A* a, const B* b, int64_t d) {
  vf sum{};
  int64_t j = 0;
  for (; j + LANES <= d; j += LANES) sum += load_as(a + j) * load_as(b + j);
  float rest = 0.0f;
  for (; j < d; ++j) rest = std::fma(widen(a[j]), widen(b[j]), rest);
  return sum_of_lanes(sum) + rest;
}

// Rows begin .. begin + rows of a head, contiguous, with rows of 0 behind up to `padded`.
template <class T>
inline void copy_rows(Head<const T> from, int64_t begin, int64_t rows, int64_t padded, int64_t d, T* to) {
  constexpr int64_t step = 32 / sizeof(T);  // a call of memcpy for each short row would cost more than its copy
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from.row(begin + i);
    int64_t j = 0;
    for (; j + step <= d; j += step) __builtin_memcpy(to + i * d + j, row + j, 32);
    for (; j < d; ++j) to[i * d + j] = row[j];
  }
  std::fill(to + rows * d, to + padded * d, T(0.0f));
}

// Contiguous rows [rows, d] turned on their side, as units: [d / per_unit][ld].
template <class T>
inline void turn_rows(const T* rows_of, int64_t rows, int64_t d, uint32_t* to, int64_t ld) {
  const int64_t units = d / per_unit<T>;
  transpose_units(reinterpret_cast<const uint32_t*>(rows_of), units, rows, units, to, ld);
}

// The few queries of a decoding step: out and lse as in the blocked pass. Keys and values may be narrower.
void attend_few(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionSizes& s,
                const at::Tensor& out, const at::Tensor& lse);
// Up to so many query rows share one reading of the keys.
constexpr int64_t kFewRows = 16;

template <class Body>
void with_kind(at::ScalarType kind, const Body& body) {
  if (kind == at::kFloat) body.template operator()<float>();
  else body.template operator()<bf16>();
}

}  // namespace gatewright
