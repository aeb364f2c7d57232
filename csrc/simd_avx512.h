// Vector helpers that the AVX-512 kernels share.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "unroll.h"

namespace {

struct Pair {
    __m512 even, odd;
};

// 32 consecutive values, even elements apart from odd ones.
inline Pair split_pair(__m512 low, __m512 high) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

// 32 consecutive values of w from i on as fp32, even elements apart from odd ones.
template <int DTYPE>
Pair load_pair(const void* w, int64_t i) {
    if constexpr (DTYPE == FP32) {
        const float* source = static_cast<const float*>(w) + i;
        return split_pair(_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16));
    } else {
        const __m512i both = _mm512_loadu_si512(static_cast<const uint16_t*>(w) + i);
        const __m512i upper = _mm512_srli_epi32(both, 16);
        if constexpr (DTYPE == BF16) {
            return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                    _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16))};
        }
        return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(upper))};
    }
}

// fp32 to bf16 in the low half of each lane, to nearest even. (vcvtneps2bf16 would flush subnormals.)
inline __m512i round_to_bf16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}

// Word j: element FROM + j of the first below, of the second above.
template <int FROM>
inline __m512i pairs(__m512i first, __m512i second) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // Elements of the second are counted from 32.
    const __m512i index = _mm512_add_epi32(_mm512_mullo_epi32(count, _mm512_set1_epi32(0x10001)),
                                           _mm512_set1_epi32((32 << 16) + 0x10001 * FROM));
    return _mm512_permutex2var_epi16(first, index, second);
}

// The pairs of 32 values of two rows.
inline void store_pairs(__m512i first, __m512i second, void* words) {
    _mm512_storeu_si512(words, pairs<0>(first, second));
    _mm512_storeu_si512(static_cast<char*>(words) + 64, pairs<16>(first, second));
}

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline void transpose_16(const __m512i (&in)[16], __m512i (&out)[16]) {
    __m512i pairs[16], fours[16];
    unroll<8>([&](auto i) {
        pairs[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    });
    // fours[4 g + c] holds, in its part l of 128 bits, lines 4 g .. 4 g + 3 at word 4 l + c.
    unroll<8>([&](auto i) {
        constexpr int group = i / 2 * 4, odd = i % 2;
        fours[group + 2 * odd] = _mm512_unpacklo_epi64(pairs[group + odd], pairs[group + odd + 2]);
        fours[group + 2 * odd + 1] = _mm512_unpackhi_epi64(pairs[group + odd], pairs[group + odd + 2]);
    });
    unroll<4>([&](auto c) {
        const __m512i a = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x44);
        const __m512i e = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xee);
        out[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        out[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        out[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        out[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
    });
}

// out [columns][rows] of words x [rows][columns]; rows is a multiple of 16.
inline void transpose_words(const uint32_t* x, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t j = 0; j < columns; j += 16) {
        const __mmask16 inside = first_lanes(columns - j);
        for (int64_t i = 0; i < rows; i += 16) {
            __m512i in[16], turned[16];
            unroll<16>([&](auto r) { in[r] = _mm512_maskz_loadu_epi32(inside, x + (i + r) * columns + j); });
            transpose_16(in, turned);
            unroll<16>([&](auto c) {
                if (j + c < columns) _mm512_storeu_si512(out + (j + c) * rows + i, turned[c]);
            });
        }
    }
}

}  // namespace
