// The many-row product of fp32 with AVX-512.
#include "product_avx512.h"

namespace {

struct Fp32 : Lanes512 {
    static __m512 words(const uint32_t* at) { return _mm512_loadu_ps(at); }
    static __m512 everywhere(uint32_t word) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(word))); }
    static __m512 add_products(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
};

void columns(const uint8_t* codes, int64_t stride, const float* absmax, int64_t blocks, int64_t rows,
             const float* codebook, uint32_t* panel) {
    const __m512 values = _mm512_loadu_ps(codebook);
    for (int64_t n = 0; n < rows; ++n) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(absmax[n * blocks]));
        for (int half = 0; half < 2; ++half) {
            // Eight bytes, one to 64 bits: the high nibble below, the byte itself above; the permute reads four
            // bits of each half.
            const __m512i byte = _mm512_cvtepu8_epi64(
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + n * stride + 8 * half)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
            _mm512_storeu_ps(panel + 32 * n + 16 * half, _mm512_permutexvar_ps(index, scaled));
        }
    }
}

void interleave(const void* first, const void*, uint32_t bits, uint32_t, int64_t width, uint32_t* words) {
    for (int64_t i = 0; i < 32; i += 16) {
        const __mmask16 kept = __mmask16(bits >> i) & first_lanes(width - i);
        _mm512_storeu_ps(words + i, _mm512_maskz_loadu_ps(kept, static_cast<const float*>(first) + i));
    }
}

void store_row(const float* sums, const float* bias, int64_t width, void* out) {
    for (int64_t i = 0; i < width; i += 16)
        _mm512_mask_storeu_ps(static_cast<float*>(out) + i, first_lanes(width - i),
                              _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(bias + i)));
}

}  // namespace

namespace avx512 {

const ProductKernels product = {
    Fp32::ROWS, 2 * Fp32::LANES, TILES_BYTES, 1, 1, tile_height<Fp32>, transpose_lines, pack_words<transpose_lines>, columns,
    interleave, kept, add_kept_lanes, multiply_words<Fp32>, store_row, nullptr};

}  // namespace avx512
