// Small row-major matmuls inside a task, and the packing that their operands need.
#pragma once

#include <cstdint>
#include <type_traits>

#include "numbers.h"

namespace gatewright {

template <class T>
constexpr bool is_bf16 = std::is_same_v<T, bf16>;

// Numbers along K that one 32-bit unit of a right-hand side holds: bf16 takes rows in pairs.
template <class T>
constexpr int64_t per_unit = is_bf16<T> ? 2 : 1;

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline uint32_t pair_of(uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; }

// C[M,N] (+)= A[M,K] B[K,N], fp32 sums. B lies in units [K / per_unit][N]; K is even for bf16. `ldb` counts units.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
              int64_t ldc, bool add);
void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
              int64_t ldc, bool add);

// To be called once per thread after its last `multiply` (gives back tile registers where there are any).
void end_of_multiplying();

// out[j][i] = in[i][j] for in [rows][columns] of 32-bit units; columns of `out` beyond `rows` are not touched.
void transpose_units(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t columns, uint32_t* out, int64_t ld_out);

// B = in^T as units: B[k][n] = in[n][k] for in [N, K], out [ceil(K / per_unit)][ld].
template <class T, class W>
void pack_transposed(const W* in, int64_t n, int64_t k, uint32_t* out, int64_t ld);

// Row length for `n` units whose rows do not fall on the same cache sets, as powers of 2 do.
inline int64_t spread(int64_t n) { return round_up(n, 16) + 16; }

// B = in as units, for in [K, N]; a missing last row of a pair is 0. fp32 in fp32 needs no copy: returns `in`.
template <class T, class W>
const uint32_t* pack_rows(const W* in, int64_t k, int64_t n, uint32_t* out);

// The bits of a number in bf16.
inline uint16_t half_of(float x) { return to_bf16(x); }
inline uint16_t half_of(bf16 x) { return x.x; }

// Units of rows [rows, n]: fp32 rows are units already; bf16 rows are taken in pairs, `rows` being even.
template <class T>
inline const uint32_t* units_of(const T* in, int64_t ld, int64_t rows, int64_t n, uint32_t* out) {
  if constexpr (!is_bf16<T>) {
    return reinterpret_cast<const uint32_t*>(in);
  } else {
    for (int64_t i = 0; i < rows / 2; ++i) {
      const T *first = in + 2 * i * ld, *second = first + ld;
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = pair_of(first[j].x, second[j].x);
    }
    return out;
  }
}

}  // namespace gatewright
