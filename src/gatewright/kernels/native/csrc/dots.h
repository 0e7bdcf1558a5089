// Dot products of a few rows with the rows of a matrix, each of which is read from memory once for all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks.h"
#include "lanes.h"
#include "numbers.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gatewright {

// What rows of T are laid out in beside weights W: bf16 where the processor multiplies pairs of it, else fp32.
template <class T, class W>
struct Panel {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Panel<bf16, bf16> {
  using type = bf16;
};
template <>
struct Panel<bf16, int8_t> {
  using type = bf16;
};
#endif

// Numbers that a row of a panel is padded to, with zeros.
constexpr int64_t kPadding = 64;
// Rows that are multiplied at a time, at most.
constexpr int64_t kFew = 8;

// One step along the common axis: `size` numbers of a row of the panel and of a row of weights.
template <class P, class W>
struct Step;

inline vf wide_lanes(const float* from) { return load(from); }
#if defined(__AVX512F__)
inline vf wide_lanes(const bf16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
inline vf wide_lanes(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#else
inline vf wide_lanes(const bf16* from) {
  vf out;
  for (int i = 0; i < LANES; ++i) out[i] = widen(from[i]);
  return out;
}
inline vf wide_lanes(const int8_t* from) {
  vf out;
  for (int i = 0; i < LANES; ++i) out[i] = from[i];
  return out;
}
#endif

template <class W>
struct Step<float, W> {
  static constexpr int64_t size = LANES;
  static vf row(const float* x) { return load(x); }
  static vf weights(const W* w) { return wide_lanes(w); }
#if defined(__AVX512F__)
  static vf add(vf sum, vf x, vf w) { return (vf)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum); }
#else
  static vf add(vf sum, vf x, vf w) { return sum + x * w; }
#endif
};

#if defined(__AVX512BF16__)
template <class W>
struct Step<bf16, W> {
  static constexpr int64_t size = 2 * LANES;
  static __m512bh row(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static __m512bh weights(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
  // Whole numbers up to 127 are exact in bf16.
  static __m512bh weights(const int8_t* w) {
    return _mm512_cvtne2ps_pbh((__m512)wide_lanes(w + LANES), (__m512)wide_lanes(w));
  }
  static vf add(vf sum, __m512bh x, __m512bh w) { return (vf)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
#endif

inline float total_of(vf sum) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)sum);
#else
  return sum_of_lanes(sum);
#endif
}

// out[j * kFew + r] = x[r] . w[j] over k numbers. The order of a sum is its own: how many rows and weights stand
// beside it changes no bit. `ahead` numbers further on stands what is read next.
template <int kRows, int kWide, class P, class W>
inline void dots(const P* x, int64_t ld, const W* const* w, int64_t k, int64_t ahead, float* out) {
  using S = Step<P, W>;
  vf sums[kWide][kRows] = {};
  auto step = [&](const P* at, const W* const* from, int64_t place) {
    decltype(S::weights(from[0])) y[kWide];
    for (int j = 0; j < kWide; ++j) y[j] = S::weights(from[j] + place);
    for (int r = 0; r < kRows; ++r) {
      const auto row = S::row(at + r * ld);
      for (int j = 0; j < kWide; ++j) sums[j][r] = S::add(sums[j][r], row, y[j]);
    }
  };
  int64_t i = 0;
  for (; i + S::size <= k; i += S::size) {
    for (int j = 0; j < kWide; ++j) __builtin_prefetch(w[j] + i + ahead, 0, 1);
    step(x + i, w, i);
  }
  if (i < k) {
    W rest[kWide][S::size] = {};
    const W* from[kWide];
    for (int j = 0; j < kWide; ++j) {
      std::memcpy(static_cast<void*>(rest[j]), w[j] + i, (k - i) * sizeof(W));
      from[j] = rest[j];
    }
    step(x + i, from, 0);
  }
  for (int j = 0; j < kWide; ++j)
    for (int r = 0; r < kRows; ++r) out[j * kFew + r] = total_of(sums[j][r]);
}

// Calls body.operator()<rows>() with the number as a constant, 1 to kFew.
template <class Body>
inline void with_rows(int64_t rows, Body&& body) {
  switch (rows) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    case 4: return body.template operator()<4>();
    case 5: return body.template operator()<5>();
    case 6: return body.template operator()<6>();
    case 7: return body.template operator()<7>();
    default: return body.template operator()<8>();
  }
}

// Rows of weights that are read side by side; with more rows of the panel fewer sums fit the registers.
template <int kRows>
constexpr int kSide = kRows <= 2 ? 8 : kRows <= 6 ? 4 : 3;

// Lays a row out as a panel's: in P, times `scale`, zeros behind it.
template <class T, class P>
inline void lay_out(const T* from, int64_t n, float scale, P* to, int64_t ld) {
  for (int64_t j = 0; j < n; ++j) {
    const T own = scale == 1.0f ? from[j] : narrow<T>(widen(from[j]) * scale);
    to[j] = narrow<P>(widen(own));
  }
  for (int64_t j = n; j < ld; ++j) to[j] = narrow<P>(0.0f);
}

}  // namespace gatewright
