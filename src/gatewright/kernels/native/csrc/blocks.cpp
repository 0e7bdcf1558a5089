// Matmuls of blocks: torch's generated kernels, or loops; and the packing that they want.
#include "blocks.h"

#include <ATen/native/CPUBlas.h>

#include <torch/library.h>

#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define GATEWRIGHT_BRGEMM 1
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gatewright {
namespace {

// Which kernels multiply: torch's generated ones, or the loops below where this torch or processor has none.
enum Engine { kLoops = 0, kGenerated = 1 };

template <class T>
bool generated_works() {
#ifdef GATEWRIGHT_BRGEMM
  try {
    // 3 rows of 16 by 5 columns: a wrong layout of pairs would show, too.
    std::vector<T> a(3 * 16);
    std::vector<uint32_t> b(16 * 5);
    std::vector<float> c(3 * 5);
    for (int i = 0; i < 48; ++i) a[i] = static_cast<T>(static_cast<float>(i % 7) - 3.0f);
    auto* rows = reinterpret_cast<T*>(b.data());
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 5; ++n)
        rows[is_bf16<T> ? (k / 2 * 5 + n) * 2 + k % 2 : k * 5 + n] = static_cast<T>(static_cast<float>((k + 2 * n) % 5));
    at::native::cpublas::brgemm(3, 5, 16, 16, 5, 5, false, a.data(), rows, c.data(), is_bf16<T>);
    for (int m = 0; m < 3; ++m)
      for (int n = 0; n < 5; ++n) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += (static_cast<float>((m * 16 + k) % 7) - 3.0f) * static_cast<float>((k + 2 * n) % 5);
        if (c[m * 5 + n] != sum) return false;
      }
    at::native::cpublas::brgemm_release(is_bf16<T>);
    return true;
  } catch (const std::exception&) {
    return false;
  }
#else
  return false;
#endif
}

template <class T>
Engine& engine_of() {
  static Engine chosen = generated_works<T>() ? kGenerated : kLoops;
  return chosen;
}

// Sums of `rows` by `kWide` outputs in registers, over all of K.
template <class T, int kRows, int kWide>
void loop_block(int64_t k, const T* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  float sums[kRows][kWide];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kWide; ++j) sums[i][j] = add ? c[i * ldc + j] : 0.0f;
  for (int64_t unit = 0; unit < k / per_unit<T>; ++unit) {
    const uint32_t* row = b + unit * ldb;
    for (int i = 0; i < kRows; ++i) {
      if constexpr (is_bf16<T>) {
        const float low = widen(a[i * lda + 2 * unit]), high = widen(a[i * lda + 2 * unit + 1]);
        for (int j = 0; j < kWide; ++j) {
          sums[i][j] = std::fma(low, float_of(row[j] << 16), sums[i][j]);
          sums[i][j] = std::fma(high, float_of(row[j] & 0xffff0000u), sums[i][j]);
        }
      } else {
        const float one = a[i * lda + unit];
        for (int j = 0; j < kWide; ++j) sums[i][j] = std::fma(one, float_of(row[j]), sums[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kWide; ++j) c[i * ldc + j] = sums[i][j];
}

template <class T, int kWide>
void loop_columns(int64_t m, int64_t k, const T* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                  bool add) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) loop_block<T, 4, kWide>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; ++i) loop_block<T, 1, kWide>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

template <class T>
void loops(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
           int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) loop_columns<T, 32>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j + 8 <= n; j += 8) loop_columns<T, 8>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j < n; ++j) loop_columns<T, 1>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
}

template <class T>
void multiply_as(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
#ifdef GATEWRIGHT_BRGEMM
  if (engine_of<T>() == kGenerated) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, reinterpret_cast<const T*>(b), c, is_bf16<T>);
    return;
  }
#endif
  loops(m, n, k, a, lda, b, ldb, c, ldc, add);
}

#if defined(__AVX512F__)
// 16 x 16 units in registers: pairs, then fours, then whole quarters change places.
void transpose_16(const uint32_t* in, int64_t ld_in, uint32_t* out, int64_t ld_out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * ld_in);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * ld_out, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * ld_out, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 4) * ld_out, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * ld_out, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#else
void transpose_16(const uint32_t* in, int64_t ld_in, uint32_t* out, int64_t ld_out) {
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 16; ++i) out[j * ld_out + i] = in[i * ld_in + j];
}
#endif

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  multiply_as(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  multiply_as(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void end_of_multiplying() {
#ifdef GATEWRIGHT_BRGEMM
  if (engine_of<bf16>() == kGenerated) at::native::cpublas::brgemm_release(true);
#endif
}

void transpose_units(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t columns, uint32_t* out, int64_t ld_out) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  // Strip by strip: the rows that are read follow one another in memory.
  for (int64_t i = 0; i < whole_rows; i += 16)
    for (int64_t j = 0; j < whole_columns; j += 16) transpose_16(in + i * ld_in + j, ld_in, out + j * ld_out + i, ld_out);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) out[j * ld_out + i] = in[i * ld_in + j];
}

template <class T, class W>
void pack_transposed(const W* in, int64_t n, int64_t k, uint32_t* out, int64_t ld) {
  const int64_t units = (k + per_unit<T> - 1) / per_unit<T>;
  if constexpr (std::is_same_v<T, W>) {
    if (k % per_unit<T> == 0) {  // then a row is a row of units already
      transpose_units(reinterpret_cast<const uint32_t*>(in), units, n, units, out, ld);
      return;
    }
  }
  std::vector<uint32_t> row(units * 16);
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t rows = std::min<int64_t>(16, n - j);
    for (int64_t i = 0; i < rows; ++i) {
      const W* from = in + (j + i) * k;
      for (int64_t u = 0; u < k / 2; ++u)
        row[i * units + u] = pair_of(half_of(from[2 * u]), half_of(from[2 * u + 1]));
      if (k % 2) row[i * units + units - 1] = pair_of(half_of(from[k - 1]), 0);
    }
    transpose_units(row.data(), units, rows, units, out + j, ld);
  }
}

template <class T, class W>
const uint32_t* pack_rows(const W* in, int64_t k, int64_t n, uint32_t* out) {
  if constexpr (!is_bf16<T>) {
    return reinterpret_cast<const uint32_t*>(in);
  } else {
    for (int64_t unit = 0; unit < k / 2; ++unit) {
      const W *first = in + 2 * unit * n, *second = first + n;
      uint32_t* row = out + unit * n;
      for (int64_t j = 0; j < n; ++j) row[j] = pair_of(half_of(first[j]), half_of(second[j]));
    }
    if (k % 2) {
      const W* last = in + (k - 1) * n;
      for (int64_t j = 0; j < n; ++j) out[k / 2 * n + j] = pair_of(half_of(last[j]), 0);
    }
    return out;
  }
}

template void pack_transposed<float, float>(const float*, int64_t, int64_t, uint32_t*, int64_t);
template void pack_transposed<bf16, bf16>(const bf16*, int64_t, int64_t, uint32_t*, int64_t);
template void pack_transposed<bf16, float>(const float*, int64_t, int64_t, uint32_t*, int64_t);
template const uint32_t* pack_rows<float, float>(const float*, int64_t, int64_t, uint32_t*);
template const uint32_t* pack_rows<bf16, bf16>(const bf16*, int64_t, int64_t, uint32_t*);
template const uint32_t* pack_rows<bf16, float>(const float*, int64_t, int64_t, uint32_t*);

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  // For doctor and tests: names the engine of each dtype; "loops" or "generated" forces both, "" asks alone.
  m.def("engine(str wanted) -> str", [](std::string wanted) {
    if (wanted == "loops") engine_of<float>() = engine_of<bf16>() = kLoops;
    if (wanted == "generated") {
      engine_of<float>() = generated_works<float>() ? kGenerated : kLoops;
      engine_of<bf16>() = generated_works<bf16>() ? kGenerated : kLoops;
    }
    auto word = [](Engine engine) { return engine == kGenerated ? "generated" : "loops"; };
    return std::string("fp32 ") + word(engine_of<float>()) + ", bf16 " + word(engine_of<bf16>());
  });
}

}  // namespace gatewright
