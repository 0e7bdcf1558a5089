// Vectors over tokens: a panel of LANES rows stands transposed, one vector per expert, so that what is done to a
// row (maxima, sums, choices) is done to LANES rows at once, in the order of experts, and never depends on the
// rows beside it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace gatewright {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vfu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t viu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vf load(const float* from) { return *reinterpret_cast<const vfu*>(from); }
inline void store(float* to, vf value) { *reinterpret_cast<vfu*>(to) = value; }
inline void store(int32_t* to, vi value) { *reinterpret_cast<viu*>(to) = value; }
inline vf splat(float value) { return vf{} + value; }
inline vi splat(int32_t value) { return vi{} + value; }
inline vf where(vi yes, vf a, vf b) { return yes ? a : b; }
inline vi where(vi yes, vi a, vi b) { return yes ? a : b; }
inline vf only(vi yes, vf a) { return (vf)((vi)a & yes); }
inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

inline float sum_of_lanes(vf x) {
  float part[LANES];
  store(part, x);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// e^x with an error below 1 ulp or so: 2^n times a polynomial in the rest; NaN stays NaN, subnormal results too.
inline vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  x = where(x < -104.0f, splat(-104.0f), x);
  x = where(x > 89.0f, splat(89.0f), x);
  const vf shifted = x * 1.44269504088896341f + magic;
  const vi n = (vi)shifted - (vi)magic;
  const vf whole = shifted - magic;
  vf r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // In two steps: 2^n alone leaves the exponent's range at both ends.
  const vi half = n >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Numbers as integers in the same order: both zeros are equal, a NaN of any sign is the highest.
inline vi key_of(vf x) {
  const vi bits = (vi)(x + 0.0f);
  const vi ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return where(x == x, ordered, splat(std::numeric_limits<int32_t>::max()));
}
constexpr int32_t TAKEN = std::numeric_limits<int32_t>::min();  // below every key

inline vi lane_numbers() {
  vi lane{};
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return lane;
}

// Transpose LANES vectors in place, by swapping ever smaller blocks.
inline void transpose(vf (&r)[LANES]) {
  const vi lane = lane_numbers();
#pragma GCC unroll 4
  for (int s = LANES / 2; s; s /= 2) {
    const vi high = (lane & s) != 0;
    const vi upper = where(high, lane + (LANES - s), lane);
    const vi lower = where(high, lane + LANES, lane + s);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & s) continue;
      const vf a = r[i], b = r[i + s];
#ifdef __clang__
      for (int j = 0; j < LANES; ++j) {
        r[i][j] = j & s ? b[j - s] : a[j];
        r[i + s][j] = j & s ? b[j] : a[j + s];
      }
#else
      r[i] = __builtin_shuffle(a, b, upper);
      r[i + s] = __builtin_shuffle(a, b, lower);
#endif
    }
  }
}

// Read `live` rows of [., E] into panel [E][LANES]; the lanes that are left over repeat the last row.
inline void read_panel(const float* rows, int64_t experts, int live, float* panel) {
  int64_t e = 0;
  for (; e + LANES <= experts; e += LANES) {
    vf r[LANES];
    for (int i = 0; i < LANES; ++i) r[i] = load(rows + (i < live ? i : live - 1) * experts + e);
    transpose(r);
    for (int i = 0; i < LANES; ++i) store(panel + (e + i) * LANES, r[i]);
  }
  for (; e < experts; ++e)
    for (int i = 0; i < LANES; ++i) panel[e * LANES + i] = rows[(i < live ? i : live - 1) * experts + e];
}

inline void write_panel(const float* panel, int64_t experts, int live, float* rows) {
  int64_t e = 0;
  for (; e + LANES <= experts; e += LANES) {
    vf r[LANES];
    for (int i = 0; i < LANES; ++i) r[i] = load(panel + (e + i) * LANES);
    transpose(r);
    for (int i = 0; i < live; ++i) store(rows + i * experts + e, r[i]);
  }
  for (; e < experts; ++e)
    for (int i = 0; i < live; ++i) rows[i * experts + e] = panel[e * LANES + i];
}

// The highest key of each lane `count` times over, the lowest expert among equals, into chosen [count][LANES].
inline void choose(int32_t* keys, int64_t experts, int64_t count, int32_t* chosen) {
  auto key = reinterpret_cast<vi*>(keys);
  for (int64_t k = 0; k < count; ++k) {
    vi even = splat(TAKEN), odd = even;
    int64_t e = 0;
    for (; e + 2 <= experts; e += 2) {
      even = where(key[e] > even, key[e], even);
      odd = where(key[e + 1] > odd, key[e + 1], odd);
    }
    if (e < experts) even = where(key[e] > even, key[e], even);
    const vi best = where(odd > even, odd, even);
    vi first{};
    for (e = experts - 1; e >= 0; --e) first = where(key[e] == best, splat((int32_t)e), first);
    store(chosen + k * LANES, first);
    if (k + 1 < count)
      for (int i = 0; i < LANES; ++i) keys[first[i] * LANES + i] = TAKEN;
  }
}

}  // namespace gatewright
