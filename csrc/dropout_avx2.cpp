// Keyed dropout with AVX2: four Philox counters in the 64-bit lanes of a vector, for 32 elements.
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "philox.h"
#include "simd_avx2.h"

namespace {

struct Bits {
    __m256i first, second;  // 16 elements each, 16 bits an element
};

inline Bits philox(const DropoutRow& row, int64_t column_block) {
    // Lanes hold column blocks 0 2 1 3, the order in which unpacking leaves them sorted.
    const __m256i lanes = _mm256_set_epi64x(3, 1, 2, 0);
    const __m256i m0 = _mm256_set1_epi64x(PHILOX_M0), m1 = _mm256_set1_epi64x(PHILOX_M1);
    __m256i c0 = _mm256_set1_epi64x(row.row), c1 = _mm256_set1_epi64x(row.position);
    __m256i c2 = _mm256_add_epi64(_mm256_set1_epi64x(column_block), lanes);
    __m256i c3 = _mm256_set1_epi64x(row.layer);
    uint32_t key0 = row.key[0], key1 = row.key[1];
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const __m256i product0 = _mm256_mul_epu32(c0, m0), product1 = _mm256_mul_epu32(c2, m1);
        c0 =
            _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(key0));
        c1 = product1;
        c2 =
            _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(key1));
        c3 = product0;
        key0 += PHILOX_W0;
        key1 += PHILOX_W1;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    return {_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high)};
}

// Eight elements; `kept` is all ones in the 16-bit lanes of those that stay.
template <int DTYPE>
void apply(const void* x, void* y, int64_t i, __m128i kept, __m256 scale) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(kept));
    if constexpr (DTYPE == FP32) {
        const __m256 values = _mm256_loadu_ps(static_cast<const float*>(x) + i);
        _mm256_storeu_ps(static_cast<float*>(y) + i, _mm256_and_ps(_mm256_mul_ps(values, scale), mask));
    } else {
        const __m128i halves =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
        __m256 values;
        if constexpr (DTYPE == BF16)
            values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
        else
            values = _mm256_cvtph_ps(halves);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + i),
                         round_to_half<DTYPE>(_mm256_and_ps(_mm256_mul_ps(values, scale), mask)));
    }
}

// 32 elements of x, which stand in columns k to k + 31 of the row.
template <int DTYPE>
void dropout_32(const DropoutRow& row, int64_t k, const void* x, void* y) {
    const __m256i threshold = _mm256_set1_epi16(int16_t(row.threshold));
    const __m256 scale = _mm256_set1_ps(row.scale);
    const Bits bits = philox(row, k / 8);
    const __m256i halves[2] = {bits.first, bits.second};
    for (int half = 0; half < 2; ++half) {
        const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(halves[half], threshold), halves[half]);
        apply<DTYPE>(x, y, 16 * half, _mm256_castsi256_si128(kept), scale);
        apply<DTYPE>(x, y, 16 * half + 8, _mm256_extracti128_si256(kept, 1), scale);
    }
}

template <int DTYPE>
void dropout_row(const DropoutRow& row) {
    constexpr int64_t bytes = DTYPE == FP32 ? 4 : 2;
    const char* x = static_cast<const char*>(row.x);
    char* y = static_cast<char*>(row.y);
    int64_t k = 0;
    for (; k + 32 <= row.K; k += 32) dropout_32<DTYPE>(row, k, x + k * bytes, y + k * bytes);
    if (k < row.K) {
        char padded[32 * bytes] = {};
        std::memcpy(padded, x + k * bytes, size_t((row.K - k) * bytes));
        dropout_32<DTYPE>(row, k, padded, padded);
        std::memcpy(y + k * bytes, padded, size_t((row.K - k) * bytes));
    }
}

}  // namespace

namespace avx2 {

void dropout(const DropoutRow& row) {
    if (row.dtype == FP32) dropout_row<FP32>(row);
    if (row.dtype == BF16) dropout_row<BF16>(row);
    if (row.dtype == FP16) dropout_row<FP16>(row);
}

void kept(const DropoutRow& row, uint32_t* bits) {
    const __m256i threshold = _mm256_set1_epi16(int16_t(row.threshold));
    const auto stays = [&](__m256i values) {
        return _mm256_cmpeq_epi16(_mm256_max_epu16(values, threshold), values);
    };
    for (int64_t k = 0; k < row.K; k += 32) {
        const Bits found = philox(row, k / 8);
        // Packing works in 128-bit halves; the permute puts the quarters in order.
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packs_epi16(stays(found.first), stays(found.second)), 0xd8);
        bits[k / 32] = uint32_t(_mm256_movemask_epi8(bytes));
    }
}

}  // namespace avx2
