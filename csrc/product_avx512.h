// What the two AVX-512 many-row products share: panels of 32 words, made by transposing 16 x 16 of them.
#pragma once

#include "product.h"
#include "simd_avx512.h"

namespace {

inline void transpose_lines(const char* lines, int64_t stride, int64_t n, int64_t count, uint32_t* out,
                            int64_t width) {
    for (int64_t half = 0; half < width; half += 16) {
        const __mmask16 lanes = first_lanes(width - half);
        for (int64_t w = 0; w < count; w += 16) {
            const __mmask16 inside = first_lanes(count - w);
            __m512i in[16], turned[16];
            unroll<16>([&](auto i) {
                in[i] = half + i < n ? _mm512_maskz_loadu_epi32(inside, lines + (half + i) * stride + 4 * w)
                                     : _mm512_setzero_si512();
            });
            transpose_16(in, turned);
            unroll<16>([&](auto i) {
                if (w + i < count) _mm512_mask_storeu_epi32(out + (w + i) * width + half, lanes, turned[i]);
            });
        }
    }
}

inline void add_kept_lanes(const float* more, uint32_t bits, float scale, float* sums) {
    for (int half = 0; half < 2; ++half) {
        const __m512 sum = _mm512_loadu_ps(sums + 16 * half), value = _mm512_loadu_ps(more + 16 * half);
        _mm512_storeu_ps(sums + 16 * half, _mm512_mask3_fmadd_ps(value, _mm512_set1_ps(scale), sum,
                                                                 __mmask16(bits >> (16 * half))));
    }
}

// The lanes of fp32 vectors; ROWS so that 2 x 12 sums, two vectors and x leave a few of 32 registers.
struct Lanes512 {
    using Vector = __m512;
    static constexpr int LANES = 16, ROWS = 12;
    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512 load(const float* at) { return _mm512_loadu_ps(at); }
    static __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static void store(float* at, __m512 values) { _mm512_storeu_ps(at, values); }
};

}  // namespace
