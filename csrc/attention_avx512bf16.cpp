// Attention with AVX-512 BF16: bf16 operands, whose pairs vdpbf16ps multiplies and adds in fp32.
//
// B is packed by pairs of rows: [k / 2, n, 2]. A's rows hold their pairs as they lie.
#include <immintrin.h>

#include "attention.h"

namespace {

struct Bf16Math : Passes<uint16_t> {
    using Operand = uint16_t;

    static void pack(const uint16_t* rows, int64_t wide, uint16_t* out) {
        for (int64_t k = 0; k < TILE; k += 2)
            for (int64_t n = 0; n < wide; ++n, out += 2) {
                out[0] = rows[k * wide + n];
                out[1] = rows[(k + 1) * wide + n];
            }
    }

    // rows [TILE, wide] as B [wide, TILE]: a pair lies in a row already.
    static void pack_transposed(const uint16_t* rows, int64_t wide, uint16_t* out) {
        for (int64_t d = 0; d < wide; d += 2)
            for (int64_t i = 0; i < TILE; ++i) std::memcpy(out + d * TILE + 2 * i, rows + i * wide + d, 4);
    }

    // c [m, n] (+)= a [m, k] b [k, n]; m and n are multiples of 16.
    static void multiply(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        int64_t j = 0;
        for (; j + 64 <= n; j += 64) columns<4>(a, m, k, b + 2 * j, n, c + j, add);
        for (; j < n; j += 16) columns<1>(a, m, k, b + 2 * j, n, c + j, add);
    }

    template <int VECTORS>
    static void columns(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        constexpr int ROWS = VECTORS == 4 ? 4 : 8;
        for (int64_t i = 0; i < m; i += ROWS) {
            __m512 sums[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v] = add ? _mm512_loadu_ps(c + (i + r) * n + 16 * v) : _mm512_setzero_ps();
            for (int64_t kk = 0; kk < k; kk += 2) {
                __m512bh line[VECTORS];
                for (int v = 0; v < VECTORS; ++v) line[v] = as_bf16(_mm512_loadu_si512(b + kk * n + 32 * v));
                for (int r = 0; r < ROWS; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, a + (i + r) * k + kk, 4);
                    const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
                    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, line[v]);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + (i + r) * n + 16 * v, sums[r][v]);
        }
    }

    // e^x to 2 units in the last place, 0 below -103.98: so is what no query sees.
    static __m512 exponential16(__m512 x) {
        x = _mm512_max_ps(x, _mm512_set1_ps(-105.0f));
        const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
        const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f),
                                          _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
        __m512 p = _mm512_set1_ps(1.9875691500e-4f);
        for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                 5.0000001201e-1f, 1.0f, 1.0f})
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
        return _mm512_scalef_ps(p, n);
    }

    static void store(uint16_t* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }

    static float exponentials(const float* s, float highest, uint16_t* p) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < TILE; j += 16) {
            const __m512 value = exponential16(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(highest)));
            sum = _mm512_add_ps(sum, value);
            store(p + j, value);
        }
        return _mm512_reduce_add_ps(sum);
    }

    static void gradients(const float* s, const float* dp, float lse, float inner, float scale, uint16_t* p,
                          uint16_t* ds) {
        for (int64_t j = 0; j < TILE; j += 16) {
            const __m512 value = exponential16(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(lse)));
            const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(dp + j), _mm512_set1_ps(inner));
            store(p + j, value);
            store(ds + j, _mm512_mul_ps(_mm512_mul_ps(value, slope), _mm512_set1_ps(scale)));
        }
    }

    static __m512bh as_bf16(__m512i words) { return reinterpret_cast<__m512bh>(words); }
};

}  // namespace

const AttentionKernels avx512bf16::attention = AttentionExport<Bf16Math>::kernels;
