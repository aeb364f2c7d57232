// What attention with AVX-512 BF16 and with AMX share: bf16 operands, and the passes over scores.
//
// B is packed by pairs of rows: [k / 2, n, 2]. A's rows hold their pairs as they lie.
#pragma once

#include "attention_math.h"
#include "simd_avx512.h"

namespace {

struct Bf16Passes : Passes<uint16_t> {
    using Operand = uint16_t;
    static constexpr float LOG2_E = 1.44269504f;

    static void pack(const uint16_t* rows, int64_t wide, uint16_t* out) {
        for (int64_t k = 0; k < TILE; k += 2)
            for (int64_t n = 0; n < wide; n += 16, out += 32)
                _mm512_storeu_si512(out, row_pairs(rows + k * wide + n, wide));
    }

    // rows [TILE, wide] as B [wide, TILE]: a pair lies in a row already.
    static void pack_transposed(const uint16_t* rows, int64_t wide, uint16_t* out) {
        transpose_words(reinterpret_cast<const uint32_t*>(rows), TILE, wide / 2, reinterpret_cast<uint32_t*>(out));
    }

    // x [rows, columns] to [columns, rows]; both multiples of 16, rows of bf16 of 32.
    static void transpose(const float* x, int64_t rows, int64_t columns, float* out) {
        transpose_words(reinterpret_cast<const uint32_t*>(x), rows, columns, reinterpret_cast<uint32_t*>(out));
    }

    static void transpose(const uint16_t* x, int64_t rows, int64_t columns, uint16_t* out) {
        for (int64_t i = 0; i < rows; i += 32)
            for (int64_t j = 0; j < columns; j += 16) {
                __m512i in[16], turned[16];
                unroll<16>([&](auto r) { in[r] = row_pairs(x + (i + 2 * r) * columns + j, columns); });
                transpose_16(in, turned);
                unroll<16>([&](auto c) { _mm512_storeu_si512(out + (j + c) * rows + i, turned[c]); });
            }
    }

    // Pairs of 16 values of a row and of the next.
    static __m512i row_pairs(const uint16_t* row, int64_t wide) {
        const auto half = [](const uint16_t* at) {
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        };
        return pairs<0>(half(row), half(row + wide));
    }

    // 2^x to 4 units in the last place, a polynomial of least relative error on [-1/2, 1/2]; 0 below -126: so is what
    // no query sees. Subnormal numbers, which would come next, cost Intel's processors a hundred cycles a vector.
    static __m512 power_of_two(__m512 x) {
        const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN too
        const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
        __m512 p = _mm512_set1_ps(1.32764725e-3f);
        for (const float term : {9.67554096e-3f, 5.55071309e-2f, 2.40221202e-1f, 6.93146944e-1f, 1.00000012f})
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
        return _mm512_maskz_scalef_ps(normal, p, n);
    }

    static float highest(const float* s) {
        __m512 most = _mm512_loadu_ps(s);
        for (int64_t j = 16; j < TILE; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + j));
        return _mm512_reduce_max_ps(most);
    }

    static float exponentials(const float* s, float scale, float highest, uint16_t* p) {
        // A row that has seen nothing yet: the difference of two roundings of UNSEEN is not 0.
        const __m512 most = _mm512_set1_ps(highest <= UNSEEN ? 0.0f : highest * LOG2_E);
        const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < TILE; j += 32) {
            const __m512 first = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), factor, most));
            const __m512 second = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(s + j + 16), factor, most));
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_storeu_si512(p + j, rounded(first, second));
        }
        return _mm512_reduce_add_ps(sum);
    }

    // Of two rows; p and ds_packed as `pack` leaves them.
    static void gradients(const float* s, float score_scale, const float* dp, const float* lse, const float* inner,
                          float scale, uint16_t* p, uint16_t* ds, uint16_t* ds_packed) {
        const __m512 factor = _mm512_set1_ps(score_scale * LOG2_E);
        for (int64_t j = 0; j < TILE; j += 32) {
            __m512i values[2], slopes[2];
            unroll<2>([&](auto row) {
                const __m512 total = _mm512_set1_ps(lse[row] * LOG2_E);
                __m512 value[2], slope[2];
                unroll<2>([&](auto half) {
                    const int64_t at = row * TILE + j + 16 * half;
                    value[half] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(s + at), factor, total));
                    const __m512 more = _mm512_sub_ps(_mm512_loadu_ps(dp + at), _mm512_set1_ps(inner[row]));
                    slope[half] = _mm512_mul_ps(_mm512_mul_ps(value[half], more), _mm512_set1_ps(scale));
                });
                values[row] = rounded(value[0], value[1]);
                slopes[row] = rounded(slope[0], slope[1]);
                _mm512_storeu_si512(ds + row * TILE + j, slopes[row]);
            });
            store_pairs(values[0], values[1], p + 2 * j);
            store_pairs(slopes[0], slopes[1], ds_packed + 2 * j);
        }
    }

    static __m512i rounded(__m512 first, __m512 second) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }

    static __m512bh as_bf16(__m512i words) { return reinterpret_cast<__m512bh>(words); }
};

}  // namespace
