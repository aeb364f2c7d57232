// Vector helpers that the AVX2 kernels share.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace {

struct Pair {
    __m256 even, odd;
};

// 16 consecutive values of w from i on as fp32, even elements apart from odd ones.
template <int DTYPE>
Pair load_pair(const void* w, int64_t i) {
    if constexpr (DTYPE == FP32) {
        const float* source = static_cast<const float*>(w) + i;
        const __m256 low = _mm256_loadu_ps(source), high = _mm256_loadu_ps(source + 8);
        // The shuffle works in 128-bit halves; the permute puts the quarters in order.
        const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
        const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)),
                _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
    } else {
        const __m256i both =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(w) + i));
        const __m256i upper = _mm256_srli_epi32(both, 16), lower = _mm256_slli_epi32(both, 16);
        if constexpr (DTYPE == BF16)
            return {_mm256_castsi256_ps(lower), _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16))};
        const __m256i packed =
            _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(lower, 16), upper), 0xd8);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed)),
                _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1))};
    }
}

// Eight fp32 values as bf16, to nearest even.
inline __m128i round_to_bf16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <int DTYPE>
__m128i round_to_half(__m256 values) {
    if constexpr (DTYPE == BF16) return round_to_bf16(values);
    return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 16 fp32 values to look up by the low four bits of each 32-bit lane.
struct Table {
    __m256 low, high;

    __m256 operator[](__m256i index) const {
        // The permutes read three bits; the fourth, moved to the sign, chooses between them.
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                choice);
    }
};

inline Table scaled_table(const float* codebook, float scale) {
    const __m256 wide = _mm256_set1_ps(scale);
    return {_mm256_mul_ps(_mm256_loadu_ps(codebook), wide),
            _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), wide)};
}

}  // namespace
