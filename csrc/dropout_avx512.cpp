// Keyed dropout with AVX-512: eight Philox counters in the 64-bit lanes of a vector, for 64 elements.
//
// A lane's upper half is scratch: the 32-bit multiply reads only the lower half, so the low word of a
// product needs no masking.
#include "convert.h"
#include "kernels.h"
#include "philox.h"
#include "simd_avx512.h"

namespace {

struct Bits {
    __m512i first, second;  // 32 elements each, 16 bits an element
};

inline Bits philox(const DropoutRow& row, int64_t column_block) {
    // Lanes hold column blocks 0 4 1 5 2 6 3 7, the order in which unpacking leaves them sorted.
    const __m512i lanes = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
    __m512i c0 = _mm512_set1_epi64(row.row), c1 = _mm512_set1_epi64(row.position);
    __m512i c2 = _mm512_add_epi64(_mm512_set1_epi64(column_block), lanes);
    __m512i c3 = _mm512_set1_epi64(row.layer);
    uint32_t key0 = row.key[0], key1 = row.key[1];
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const __m512i product0 = _mm512_mul_epu32(c0, m0), product1 = _mm512_mul_epu32(c2, m1);
        // 0x96: the exclusive or of three.
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(key0), 0x96);
        c1 = product1;
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(key1), 0x96);
        c3 = product0;
        key0 += PHILOX_W0;
        key1 += PHILOX_W1;
    }
    const __mmask16 upper = 0xaaaa;
    const __m512i low = _mm512_mask_blend_epi32(upper, c0, _mm512_slli_epi64(c1, 32));
    const __m512i high = _mm512_mask_blend_epi32(upper, c2, _mm512_slli_epi64(c3, 32));
    return {_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high)};
}

// Sixteen values times scale, those outside `kept` zero.
inline __m512 scaled(__m512 values, __mmask16 kept, __m512 scale) {
    return _mm512_maskz_mul_ps(kept, values, scale);
}

// Up to 32 elements from k on; `kept` has no bit beyond the row's end, `inside` has all before it.
template <int DTYPE>
void apply(const DropoutRow& row, int64_t k, __mmask32 inside, __mmask32 kept, __m512 scale) {
    if constexpr (DTYPE == FP32) {
        for (int half = 0; half < 2; ++half) {
            const __mmask16 in = __mmask16(inside >> (16 * half)), keep = __mmask16(kept >> (16 * half));
            const __m512 x = _mm512_maskz_loadu_ps(in, static_cast<const float*>(row.x) + k + 16 * half);
            _mm512_mask_storeu_ps(static_cast<float*>(row.y) + k + 16 * half, in, scaled(x, keep, scale));
        }
    } else {
        const __m512i x = _mm512_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(row.x) + k);
        __m256i halves[2] = {_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)};
        for (int half = 0; half < 2; ++half) {
            const __mmask16 keep = __mmask16(kept >> (16 * half));
            if constexpr (DTYPE == BF16) {
                const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[half]), 16);
                halves[half] =
                    _mm512_cvtepi32_epi16(round_to_bf16(scaled(_mm512_castsi512_ps(wide), keep, scale)));
            } else {
                halves[half] = _mm512_cvtps_ph(scaled(_mm512_cvtph_ps(halves[half]), keep, scale),
                                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            }
        }
        const __m512i y = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(row.y) + k, inside, y);
    }
}

// Of 64 elements from k on.
inline uint64_t kept_64(const DropoutRow& row, int64_t k) {
    const __m512i threshold = _mm512_set1_epi16(int16_t(row.threshold));
    const Bits bits = philox(row, k / 8);
    return uint64_t(_mm512_cmpge_epu16_mask(bits.second, threshold)) << 32 |
           _mm512_cmpge_epu16_mask(bits.first, threshold);
}

template <int DTYPE>
void dropout_row(const DropoutRow& row) {
    const __m512 scale = _mm512_set1_ps(row.scale);
    for (int64_t k = 0; k < row.K; k += 64) {
        const int64_t left = row.K - k;
        const uint64_t inside = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
        const uint64_t kept = inside & kept_64(row, k);
        apply<DTYPE>(row, k, __mmask32(inside), __mmask32(kept), scale);
        if (left > 32) apply<DTYPE>(row, k + 32, __mmask32(inside >> 32), __mmask32(kept >> 32), scale);
    }
}

}  // namespace

namespace avx512 {

void dropout(const DropoutRow& row) {
    if (row.dtype == FP32) dropout_row<FP32>(row);
    if (row.dtype == BF16) dropout_row<BF16>(row);
    if (row.dtype == FP16) dropout_row<FP16>(row);
}

void kept(const DropoutRow& row, uint32_t* bits) {
    for (int64_t k = 0; k < row.K; k += 64) {
        const uint64_t found = kept_64(row, k);
        bits[k / 32] = uint32_t(found);
        if (row.K - k > 32) bits[k / 32 + 1] = uint32_t(found >> 32);
    }
}

}  // namespace avx512
