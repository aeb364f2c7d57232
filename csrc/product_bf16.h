// What the two many-row products of bf16, AVX-512 BF16's and AMX's, share.
#pragma once

#include "product_avx512.h"

namespace {

constexpr int64_t AHEAD = 16;  // rows; each lies in other lines of the cache

inline void columns(const uint8_t* codes, int64_t stride, const float* absmax, int64_t blocks, int64_t rows,
             const float* codebook, uint32_t* panel) {
    const __m512 values = _mm512_loadu_ps(codebook);
    const auto restored = [&](int64_t n) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + (n + AHEAD) * stride), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(absmax + (n + AHEAD) * blocks), _MM_HINT_T0);
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(absmax[n * blocks]));
        // The permute reads five bits; with the 16 values there twice, the fifth does not matter.
        const __m512i table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
        const __m512i byte =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + n * stride)));
        return _mm512_permutexvar_epi16(
            _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16)), table);
    };
    for (int64_t n = 0; n < rows; n += 2)
        store_pairs(restored(n), n + 1 < rows ? restored(n + 1) : _mm512_setzero_si512(), panel + 16 * n);
}

inline void interleave(const void* first, const void* second, uint32_t bits, uint32_t second_bits, int64_t width,
                uint32_t* words) {
    const uint32_t inside = width >= 32 ? ~0u : (1u << width) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(__mmask32(bits & inside), first);
    const __m512i high = second ? _mm512_maskz_loadu_epi16(__mmask32(second_bits & inside), second)
                                : _mm512_setzero_si512();
    store_pairs(low, high, words);
}

inline void store_row(const float* sums, const float* bias, int64_t width, void* out) {
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 values = _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(bias + i));
        _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(out) + i, first_lanes(width - i),
                                          round_to_bf16(values));
    }
}

}  // namespace
