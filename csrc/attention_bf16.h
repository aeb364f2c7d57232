// What attention with AVX-512 BF16 and with AMX share: bf16 operands, and the passes over scores.
//
// B is packed by pairs of rows: [k / 2, n, 2]. A's rows hold their pairs as they lie.
#pragma once

#include "attention_math.h"
#include "simd_avx512.h"

namespace {

struct Bf16Passes : Passes<uint16_t> {
    using Operand = uint16_t;

    static void pack(const uint16_t* rows, int64_t wide, uint16_t* out) {
        for (int64_t k = 0; k < TILE; k += 2)
            for (int64_t n = 0; n < wide; n += 16, out += 32) {
                const auto half = [&](int64_t row) {
                    return _mm512_castsi256_si512(
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * wide + n)));
                };
                _mm512_storeu_si512(out, pairs<0>(half(k), half(k + 1)));
            }
    }

    // rows [TILE, wide] as B [wide, TILE]: a pair lies in a row already.
    static void pack_transposed(const uint16_t* rows, int64_t wide, uint16_t* out) {
        for (int64_t d = 0; d < wide; d += 2)
            for (int64_t i = 0; i < TILE; ++i) std::memcpy(out + d * TILE + 2 * i, rows + i * wide + d, 4);
    }

    // e^x to 2 units in the last place, 0 below -87.3: so is what no query sees. Subnormal numbers, which would come
    // next, cost Intel's processors a hundred cycles a vector.
    static __m512 exponential16(__m512 x) {
        const __m512 least = _mm512_set1_ps(-87.3f);
        const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
        x = _mm512_max_ps(least, x);  // of the two the second where x is NaN
        const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
        const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f),
                                          _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
        __m512 p = _mm512_set1_ps(1.9875691500e-4f);
        for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                 5.0000001201e-1f, 1.0f, 1.0f})
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
        return _mm512_maskz_scalef_ps(normal, p, n);
    }

    static void store(uint16_t* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }

    static float highest(const float* s) {
        __m512 most = _mm512_loadu_ps(s);
        for (int64_t j = 16; j < TILE; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + j));
        return _mm512_reduce_max_ps(most);
    }

    static float exponentials(const float* s, float scale, float highest, uint16_t* p) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < TILE; j += 16) {
            const __m512 value = exponential16(
                _mm512_fmsub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(scale), _mm512_set1_ps(highest)));
            sum = _mm512_add_ps(sum, value);
            store(p + j, value);
        }
        return _mm512_reduce_add_ps(sum);
    }

    static void gradients(const float* s, float score_scale, const float* dp, float lse, float inner, float scale,
                          uint16_t* p, uint16_t* ds) {
        for (int64_t j = 0; j < TILE; j += 16) {
            const __m512 value = exponential16(
                _mm512_fmsub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(score_scale), _mm512_set1_ps(lse)));
            const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(dp + j), _mm512_set1_ps(inner));
            store(p + j, value);
            store(ds + j, _mm512_mul_ps(_mm512_mul_ps(value, slope), _mm512_set1_ps(scale)));
        }
    }

    static __m512bh as_bf16(__m512i words) { return reinterpret_cast<__m512bh>(words); }
};

}  // namespace
