// The codec with AVX-512 (F, BW, DQ, VL): 32 values at a time, one per byte nibble.
//
// Quantizing separates even and odd elements, which become the high and low nibbles; for bf16 this is
// a shift and a mask. Four permutes walk the search tree, a fifth maps the position to its code.
// Decoding rounds a block's 16 possible values once and looks them up by code.
#include "convert.h"
#include "kernels.h"
#include "simd_avx512.h"

namespace {

// The largest magnitude of a block, compared as integers: the same order for finite values, and NaN
// above all of them.
template <int DTYPE>
float largest_magnitude(const void* w, int64_t start, int64_t count) {
    __m512i largest = _mm512_setzero_si512();
    if constexpr (DTYPE == FP32) {
        const __m512i mask = _mm512_set1_epi32(0x7fffffff);
        const float* source = static_cast<const float*>(w) + start;
        for (int64_t i = 0; i < count; i += 16)
            largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(source + i), mask));
        return float_of(uint32_t(_mm512_reduce_max_epi32(largest)));
    } else {
        const __m512i mask = _mm512_set1_epi16(0x7fff);
        const uint16_t* source = static_cast<const uint16_t*>(w) + start;
        for (int64_t i = 0; i < count; i += 32)
            largest = _mm512_max_epi16(largest, _mm512_and_si512(_mm512_loadu_si512(source + i), mask));
        const __m256i half =
            _mm256_max_epi16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
        const __m128i quarter =
            _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        // minpos finds the smallest unsigned word; the complement of the largest is the smallest.
        const __m128i flipped = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
        const uint16_t magnitude = uint16_t(~_mm_cvtsi128_si32(flipped));
        return DTYPE == BF16 ? from_bf16(magnitude) : from_fp16(magnitude);
    }
}

// Tree nodes 16..31, whose low four bits are the sorted position.
inline __m512i search_tree(__m512 y, __m512 tree, __m512 root) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i node = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(y, root, _CMP_GT_OQ), _mm512_set1_epi32(2),
                                           _mm512_set1_epi32(3));
    for (int step = 0; step < 3; ++step) {
        const __mmask16 above = _mm512_cmp_ps_mask(y, _mm512_permutexvar_ps(node, tree), _CMP_GT_OQ);
        node = _mm512_add_epi32(node, node);
        node = _mm512_mask_or_epi32(node, above, node, one);
    }
    return node;
}

template <int DTYPE>
void quantize_blocks(const void* w, int64_t blocks, int64_t block_size, const Search& search, uint8_t* codes,
                     float* absmax) {
    const __m512 tree = _mm512_loadu_ps(search.tree), root = _mm512_set1_ps(search.tree[1]);
    const __m512i low_code = _mm512_loadu_si512(search.order);
    const __m512i high_code = _mm512_slli_epi32(low_code, 4);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * block_size;
        absmax[block] = largest_magnitude<DTYPE>(w, start, block_size);
        const __m512 inverse = _mm512_set1_ps(1.0f / (absmax[block] < 1e-38f ? 1e-38f : absmax[block]));
        for (int64_t i = start; i < start + block_size; i += 32) {
            const Pair values = load_pair<DTYPE>(w, i);
            const __m512i even = search_tree(_mm512_mul_ps(values.even, inverse), tree, root);
            const __m512i odd = search_tree(_mm512_mul_ps(values.odd, inverse), tree, root);
            const __m512i bytes = _mm512_or_si512(_mm512_permutexvar_epi32(even, high_code),
                                                  _mm512_permutexvar_epi32(odd, low_code));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 2), _mm512_cvtepi32_epi8(bytes));
        }
    }
}

inline void store(void* target, __m512i values, bool stream) {
    if (stream)
        _mm512_stream_si512(static_cast<__m512i*>(target), values);
    else
        _mm512_storeu_si512(target, values);
}

template <int DTYPE>
void dequantize_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                       const float* codebook, void* out, bool stream) {
    const __m512 values = _mm512_loadu_ps(codebook);
    for (int64_t block = 0; block < blocks; ++block) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(absmax[block]));
        const int64_t start = block * block_size;
        if constexpr (DTYPE == FP32) {
            float* target = static_cast<float*>(out);
            for (int64_t i = start; i < start + block_size; i += 16) {
                // Eight bytes, one to 64 bits: its high nibble below, the byte itself above; the
                // permute reads four bits of each half.
                const __m512i byte =
                    _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
                const __m512i index =
                    _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
                store(target + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, scaled)), stream);
            }
        } else {
            const __m256i rounded =
                DTYPE == BF16 ? _mm512_cvtepi32_epi16(round_to_bf16(scaled))
                              : _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            // The permute reads five bits; with the 16 values there twice, the fifth does not matter.
            const __m512i table = _mm512_broadcast_i64x4(rounded);
            uint16_t* target = static_cast<uint16_t*>(out);
            for (int64_t i = start; i < start + block_size; i += 32) {
                const __m512i byte =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
                const __m512i index =
                    _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
                store(target + i, _mm512_permutexvar_epi16(index, table), stream);
            }
        }
    }
    if (stream) _mm_sfence();
}

}  // namespace

namespace avx512 {

void quantize(const void* w, int dtype, int64_t blocks, int64_t block_size, const Search& search,
              uint8_t* codes, float* absmax) {
    if (dtype == FP32) quantize_blocks<FP32>(w, blocks, block_size, search, codes, absmax);
    if (dtype == BF16) quantize_blocks<BF16>(w, blocks, block_size, search, codes, absmax);
    if (dtype == FP16) quantize_blocks<FP16>(w, blocks, block_size, search, codes, absmax);
}

void dequantize(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                const float* codebook, void* out, int dtype, bool stream) {
    if (dtype == FP32) dequantize_blocks<FP32>(codes, absmax, blocks, block_size, codebook, out, stream);
    if (dtype == BF16) dequantize_blocks<BF16>(codes, absmax, blocks, block_size, codebook, out, stream);
    if (dtype == FP16) dequantize_blocks<FP16>(codes, absmax, blocks, block_size, codebook, out, stream);
}

bool has_nonfinite(const void* w, int dtype, int64_t n) {
    __m512i found = _mm512_setzero_si512();
    int64_t i = 0;
    if (dtype == FP32) {
        const __m512i exponent = _mm512_set1_epi32(0x7f800000);
        for (; i + 16 <= n; i += 16) {
            const __m512i bits = _mm512_loadu_si512(static_cast<const float*>(w) + i);
            const __mmask16 hit = _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
            found = _mm512_or_si512(found, _mm512_movm_epi32(hit));
        }
    } else {
        const __m512i exponent = _mm512_set1_epi16(dtype == BF16 ? 0x7f80 : 0x7c00);
        for (; i + 32 <= n; i += 32) {
            const __m512i bits = _mm512_loadu_si512(static_cast<const uint16_t*>(w) + i);
            const __mmask32 hit = _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, exponent), exponent);
            found = _mm512_or_si512(found, _mm512_movm_epi16(hit));
        }
    }
    const char* rest = static_cast<const char*>(w) + i * dtype_bytes(dtype);
    return _mm512_test_epi32_mask(found, found) != 0 || scalar::has_nonfinite(rest, dtype, n - i);
}

// A table of 256 words is four permutes of 64 and a choice by the upper two bits: faster than a gather, and twice
// as many at a time as floats. So the map is split into the lower and upper halves of its values.
void restore(const uint8_t* codes8, int64_t count, const float* map, float scale, float offset,
             float* absmax) {
    __m512i lower[8], upper[8];  // 32 values each
    const __m512i even = _mm512_slli_epi16(
        _mm512_cvtepu8_epi16(_mm256_set_epi64x(0x1f1e1d1c1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908,
                                               0x0706050403020100)),
        1);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int part = 0; part < 8; ++part) {
        const __m512i first = _mm512_loadu_si512(map + 32 * part);
        const __m512i second = _mm512_loadu_si512(map + 32 * part + 16);
        lower[part] = _mm512_permutex2var_epi16(first, even, second);
        upper[part] = _mm512_permutex2var_epi16(first, odd, second);
    }
    const auto look_up = [](const __m512i* half, __m512i index, __mmask32 bit6, __mmask32 bit7) {
        __m512i found[4];
        for (int part = 0; part < 4; ++part)
            found[part] = _mm512_permutex2var_epi16(half[2 * part], index, half[2 * part + 1]);
        return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, found[0], found[1]),
                                       _mm512_mask_blend_epi16(bit6, found[2], found[3]));
    };
    const __m512 wide_scale = _mm512_set1_ps(scale), wide_offset = _mm512_set1_ps(offset);
    const auto store = [&](__m512i value, float* to, uint32_t lanes) {
        const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(value), wide_scale);
        _mm512_mask_storeu_ps(to, __mmask16(lanes), _mm512_add_ps(scaled, wide_offset));
    };
    // In every lane of 128 bits four of the first 16 codes and four of the last, as unpacking takes them.
    const __m256i spread = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    for (int64_t i = 0; i < count; i += 32) {
        const uint32_t lanes = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
        const __m256i bytes = _mm256_maskz_loadu_epi8(lanes, codes8 + i);
        const __m512i index = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, spread));
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
        const __m512i low = look_up(lower, index, bit6, bit7), high = look_up(upper, index, bit6, bit7);
        store(_mm512_unpacklo_epi16(low, high), absmax + i, lanes);
        store(_mm512_unpackhi_epi16(low, high), absmax + i + 16, lanes >> 16);
    }
}

}  // namespace avx512
