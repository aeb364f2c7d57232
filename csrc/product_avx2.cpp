// The many-row product of fp32 with AVX2: panels of 16 words, made by transposing 8 x 8 of them.
#include <immintrin.h>

#include <cstring>

#include "product.h"

namespace {

// ROWS so that 2 x 6 sums, two vectors and x leave one of 16 registers.
struct Fp32 {
    using Vector = __m256;
    static constexpr int LANES = 8, ROWS = 6;
    static __m256 zero() { return _mm256_setzero_ps(); }
    static __m256 load(const float* at) { return _mm256_loadu_ps(at); }
    static __m256 plus(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
    static void store(float* at, __m256 values) { _mm256_storeu_ps(at, values); }
    static __m256 words(const uint32_t* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
    static __m256 everywhere(uint32_t word) { return _mm256_castsi256_ps(_mm256_set1_epi32(int(word))); }
    static __m256 add_products(__m256 sum, __m256 x, __m256 w) { return _mm256_fmadd_ps(x, w, sum); }
};

__m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count < 8 ? count : 8)), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

void transpose_8(const __m256 (&in)[8], __m256 (&out)[8]) {
    __m256 pairs[8], fours[8];
    unroll<4>([&](auto i) {
        pairs[2 * i] = _mm256_unpacklo_ps(in[2 * i], in[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(in[2 * i], in[2 * i + 1]);
    });
    // fours[4 g + c] holds, in its half l, lines 4 g .. 4 g + 3 at word 4 l + c.
    unroll<4>([&](auto i) {
        constexpr int group = i / 2 * 4, odd = i % 2;
        const __m256d a = _mm256_castps_pd(pairs[group + odd]), b = _mm256_castps_pd(pairs[group + odd + 2]);
        fours[group + 2 * odd] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        fours[group + 2 * odd + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    });
    unroll<4>([&](auto c) {
        out[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
        out[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
    });
}

void transpose_lines(const char* lines, int64_t stride, int64_t n, int64_t count, uint32_t* out, int64_t width) {
    for (int64_t half = 0; half < width; half += 8) {
        const __m256i lanes = first_lanes(width - half);
        for (int64_t w = 0; w < count; w += 8) {
            const __m256i inside = first_lanes(count - w);
            __m256 in[8], turned[8];
            unroll<8>([&](auto i) {
                const char* line = lines + (half + i) * stride + 4 * w;
                in[i] = half + i < n ? _mm256_maskload_ps(reinterpret_cast<const float*>(line), inside)
                                     : _mm256_setzero_ps();
            });
            transpose_8(in, turned);
            unroll<8>([&](auto i) {
                float* at = reinterpret_cast<float*>(out + (w + i) * width + half);
                if (w + i < count) _mm256_maskstore_ps(at, lanes, turned[i]);
            });
        }
    }
}

void columns(const uint8_t* codes, int64_t stride, const float* absmax, int64_t blocks, int64_t rows,
             const float* codebook, uint32_t* panel) {
    const __m256 lower = _mm256_loadu_ps(codebook), upper = _mm256_loadu_ps(codebook + 8);
    for (int64_t n = 0; n < rows; ++n) {
        const __m256 scale = _mm256_set1_ps(absmax[n * blocks]);
        for (int half = 0; half < 2; ++half) {
            // Four bytes, one to 64 bits: the high nibble below, the byte itself above. The permute reads three
            // bits, the blend the fourth, moved to the sign.
            int32_t four;
            std::memcpy(&four, codes + n * stride + 4 * half, 4);
            const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            const __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
            const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index),
                                                  _mm256_permutevar8x32_ps(upper, index),
                                                  _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
            _mm256_storeu_ps(reinterpret_cast<float*>(panel + 16 * n + 8 * half), _mm256_mul_ps(value, scale));
        }
    }
}

// All ones in the lanes of eight bits.
__m256i spread(uint32_t bits) {
    const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each);
}

void interleave(const void* first, const void*, uint32_t bits, uint32_t, int64_t width, uint32_t* words) {
    for (int64_t i = 0; i < 16; i += 8) {
        const __m256i kept = _mm256_and_si256(spread(bits >> i), first_lanes(width - i));
        _mm256_storeu_ps(reinterpret_cast<float*>(words + i),
                         _mm256_maskload_ps(static_cast<const float*>(first) + i, kept));
    }
}

void add_kept(const float* more, uint32_t bits, float scale, float* sums) {
    for (int64_t i = 0; i < 16; i += 8) {
        const __m256 value = _mm256_and_ps(_mm256_castsi256_ps(spread(bits >> i)), _mm256_loadu_ps(more + i));
        _mm256_storeu_ps(sums + i, _mm256_fmadd_ps(value, _mm256_set1_ps(scale), _mm256_loadu_ps(sums + i)));
    }
}

void store_row(const float* sums, const float* bias, int64_t width, void* out) {
    for (int64_t i = 0; i < width; ++i) static_cast<float*>(out)[i] = sums[i] + bias[i];
}

}  // namespace

namespace avx2 {

const ProductKernels product = {
    Fp32::ROWS, 2 * Fp32::LANES, TILES_BYTES, 1, 1, tile_height<Fp32>, transpose_lines, pack_words<transpose_lines>, columns,
    interleave, kept, add_kept, multiply_words<Fp32>, store_row, nullptr};

}  // namespace avx2
