// Vector helpers that the AVX-512 kernels share.
#pragma once

#include <immintrin.h>

#include "convert.h"

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

}  // namespace
