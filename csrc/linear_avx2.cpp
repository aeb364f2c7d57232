// The few-row product with AVX2: as in linear_avx512.cpp, with half the width and fewer registers.
#include "convert.h"
#include "kernels.h"
#include "simd_avx2.h"
#include "unroll.h"

namespace {

inline float total(__m256 values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <int ROWS, int M>
void tile(const LinearRows& rows, int64_t n, int64_t m) {
    const int64_t K = rows.K, row_blocks = K / rows.block_size;
    const uint8_t* codes = rows.codes + n * K / 2;
    const float* absmax = rows.absmax + n * row_blocks;
    const float* x = rows.x + m * rows.x_stride;
    __m256 even[ROWS][M], odd[ROWS][M];
    unroll<ROWS>([&](auto r) { unroll<M>([&](auto i) { even[r][i] = odd[r][i] = _mm256_setzero_ps(); }); });

    for (int64_t block = 0; block < row_blocks; ++block) {
        Table table[ROWS];
        unroll<ROWS>([&](auto r) { table[r] = scaled_table(rows.codebook, absmax[r * row_blocks + block]); });
        const int64_t end = (block + 1) * rows.block_size;
        for (int64_t k = block * rows.block_size; k < end; k += 32) {
            // x holds 16 even elements and then 16 odd ones; eight of each meet eight bytes.
            for (int64_t part = 0; part < 16; part += 8) {
                unroll<ROWS>([&](auto r) {
                    const __m256i byte = _mm256_cvtepu8_epi32(
                        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + (r * K + k) / 2 + part)));
                    const __m256 high = table[r][_mm256_srli_epi32(byte, 4)], low = table[r][byte];
                    unroll<M>([&](auto i) {
                        const float* at = x + i * rows.x_stride + k + part;
                        even[r][i] = _mm256_fmadd_ps(high, _mm256_loadu_ps(at), even[r][i]);
                        odd[r][i] = _mm256_fmadd_ps(low, _mm256_loadu_ps(at + 16), odd[r][i]);
                    });
                });
            }
        }
    }
    unroll<ROWS>([&](auto r) {
        unroll<M>([&](auto i) {
            rows.y[(m + i) * rows.rows + n + r] = total(_mm256_add_ps(even[r][i], odd[r][i]));
        });
    });
}

// All weight rows against M rows of x.
template <int ROWS, int M>
void stripe(const LinearRows& rows, int64_t m) {
    int64_t n = 0;
    for (; n + ROWS <= rows.rows; n += ROWS) tile<ROWS, M>(rows, n, m);
    for (; n < rows.rows; ++n) tile<1, M>(rows, n, m);
}

}  // namespace

namespace avx2 {

void prepare(const void* x, int dtype, int64_t K, float* prepared) {
    for (int64_t k = 0; k < K; k += 16) {
        const Pair pair = dtype == FP32   ? load_pair<FP32>(x, k)
                          : dtype == BF16 ? load_pair<BF16>(x, k)
                                          : load_pair<FP16>(x, k);
        float* run = prepared + k / 32 * 32 + k % 32 / 2;
        _mm256_storeu_ps(run, pair.even);
        _mm256_storeu_ps(run + 16, pair.odd);
    }
}

void linear(const LinearRows& rows) {
    int64_t m = 0;
    for (; m + 4 <= rows.M; m += 4) stripe<1, 4>(rows, m);
    if (rows.M - m == 3) stripe<1, 3>(rows, m);
    if (rows.M - m == 2) stripe<2, 2>(rows, m);
    if (rows.M - m == 1) stripe<2, 1>(rows, m);
}

float dot(const float* a, const float* b, int64_t n) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; ++j)
            sums[j] =
                _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * j), _mm256_loadu_ps(b + i + 8 * j), sums[j]);
    float rest = 0.0f;
    for (; i < n; ++i) rest += a[i] * b[i];
    return rest + total(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

}  // namespace avx2
