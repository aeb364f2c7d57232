// The few-row product with AVX-512.
//
// Sixteen bytes of codes hold 32 weights. A block's codebook times its scale stays in one register,
// and a permute by nibble gives the weights, the same fp32 values that decoding gives. A few weight
// rows are walked together, so that each load of x serves all of them. Every pair of rows has its own
// two sums, kept in the same order whatever the tile, so that a result does not depend on M.
#include "convert.h"
#include "kernels.h"
#include "simd_avx512.h"
#include "unroll.h"

namespace {

template <int ROWS, int M>
void tile(const LinearRows& rows, int64_t n, int64_t m) {
    const int64_t K = rows.K, row_blocks = K / rows.block_size;
    const uint8_t* codes = rows.codes + n * K / 2;
    const float* absmax = rows.absmax + n * row_blocks;
    const float* x = rows.x + m * rows.x_stride;
    const __m512 codebook = _mm512_loadu_ps(rows.codebook);
    __m512 even[ROWS][M], odd[ROWS][M];
    unroll<ROWS>([&](auto r) { unroll<M>([&](auto i) { even[r][i] = odd[r][i] = _mm512_setzero_ps(); }); });

    for (int64_t block = 0; block < row_blocks; ++block) {
        __m512 table[ROWS];
        unroll<ROWS>([&](auto r) {
            table[r] = _mm512_mul_ps(codebook, _mm512_set1_ps(absmax[r * row_blocks + block]));
        });
        const int64_t end = (block + 1) * rows.block_size;
        for (int64_t k = block * rows.block_size; k < end; k += 32) {
            unroll<ROWS>([&](auto r) {
                const uint8_t* at = codes + (r * K + k) / 2;
                if (k % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(at + ROWS * K / 2), _MM_HINT_T0);
                const __m512i byte =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
                const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table[r]);
                const __m512 low = _mm512_permutexvar_ps(byte, table[r]);
                unroll<M>([&](auto i) {
                    const float* values = x + i * rows.x_stride + k;
                    even[r][i] = _mm512_fmadd_ps(high, _mm512_loadu_ps(values), even[r][i]);
                    odd[r][i] = _mm512_fmadd_ps(low, _mm512_loadu_ps(values + 16), odd[r][i]);
                });
            });
        }
    }
    unroll<ROWS>([&](auto r) {
        unroll<M>([&](auto i) {
            rows.y[(m + i) * rows.rows + n + r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r][i], odd[r][i]));
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

namespace avx512 {

void prepare(const void* x, int dtype, int64_t K, float* prepared) {
    for (int64_t k = 0; k < K; k += 32) {
        const Pair pair = dtype == FP32   ? load_pair<FP32>(x, k)
                          : dtype == BF16 ? load_pair<BF16>(x, k)
                                          : load_pair<FP16>(x, k);
        _mm512_storeu_ps(prepared + k, pair.even);
        _mm512_storeu_ps(prepared + k + 16, pair.odd);
    }
}

void linear(const LinearRows& rows) {
    int64_t m = 0;
    for (; m + 4 <= rows.M; m += 4) stripe<2, 4>(rows, m);
    if (rows.M - m == 3) stripe<2, 3>(rows, m);
    if (rows.M - m == 2) stripe<4, 2>(rows, m);
    if (rows.M - m == 1) stripe<4, 1>(rows, m);
}

float dot(const float* a, const float* b, int64_t n) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; ++j)
            sums[j] =
                _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * j), _mm512_loadu_ps(b + i + 16 * j), sums[j]);
    for (; i < n; i += 16) {
        const __mmask16 rest = n - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - i)) - 1);
        sums[0] =
            _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rest, a + i), _mm512_maskz_loadu_ps(rest, b + i), sums[0]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace avx512
