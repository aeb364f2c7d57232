// The codec with AVX2: 16 values at a time when quantizing, 32 when restoring to 16 bits.
//
// The same steps as codec_avx512.cpp. The first three levels of the search tree are its nodes 1 to 7
// and the last one nodes 8 to 15, so that each step is one permute of eight values.
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "simd_avx2.h"

namespace {

inline __m256i load(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
inline void store(void* target, __m256i values) {
    _mm256_storeu_si256(static_cast<__m256i*>(target), values);
}

// The largest magnitude of a block, compared as integers.
template <int DTYPE>
float largest_magnitude(const void* w, int64_t start, int64_t count) {
    __m256i largest = _mm256_setzero_si256();
    if constexpr (DTYPE == FP32) {
        const __m256i mask = _mm256_set1_epi32(0x7fffffff);
        const float* source = static_cast<const float*>(w) + start;
        for (int64_t i = 0; i < count; i += 8)
            largest = _mm256_max_epi32(largest, _mm256_and_si256(load(source + i), mask));
        __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        return float_of(uint32_t(_mm_cvtsi128_si32(half)));
    } else {
        const __m256i mask = _mm256_set1_epi16(0x7fff);
        const uint16_t* source = static_cast<const uint16_t*>(w) + start;
        for (int64_t i = 0; i < count; i += 16)
            largest = _mm256_max_epi16(largest, _mm256_and_si256(load(source + i), mask));
        const __m128i half =
            _mm_max_epi16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        // minpos finds the smallest unsigned word; the complement of the largest is the smallest.
        const __m128i flipped = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
        const uint16_t magnitude = uint16_t(~_mm_cvtsi128_si32(flipped));
        return DTYPE == BF16 ? from_bf16(magnitude) : from_fp16(magnitude);
    }
}

// Tree nodes 16..31, whose low four bits are the sorted position.
inline __m256i search_tree(__m256 y, __m256 upper_nodes, __m256 lower_nodes, __m256 root) {
    const auto descend = [y](__m256i node, __m256 threshold) {
        const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(y, threshold, _CMP_GT_OQ));
        return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
    };
    __m256i node = descend(_mm256_set1_epi32(1), root);
    node = descend(node, _mm256_permutevar8x32_ps(upper_nodes, node));
    node = descend(node, _mm256_permutevar8x32_ps(upper_nodes, node));
    return descend(node, _mm256_permutevar8x32_ps(lower_nodes, node));
}

template <int DTYPE>
void quantize_blocks(const void* w, int64_t blocks, int64_t block_size, const Search& search, uint8_t* codes,
                     float* absmax) {
    const __m256 root = _mm256_set1_ps(search.tree[1]);
    const __m256 upper_nodes = _mm256_loadu_ps(search.tree), lower_nodes = _mm256_loadu_ps(search.tree + 8);
    alignas(16) uint8_t order[16];
    for (int i = 0; i < 16; ++i) order[i] = uint8_t(search.order[i]);
    const __m128i low_nibble = _mm_load_si128(reinterpret_cast<const __m128i*>(order));
    const __m256i low_code = _mm256_broadcastsi128_si256(low_nibble);
    const __m256i high_code = _mm256_broadcastsi128_si256(_mm_slli_epi16(low_nibble, 4));
    // The lowest byte of each 32-bit lane.
    const __m256i lowest = _mm256_broadcastsi128_si256(_mm_set1_epi32(0x0c080400));
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * block_size;
        absmax[block] = largest_magnitude<DTYPE>(w, start, block_size);
        const __m256 inverse = _mm256_set1_ps(1.0f / (absmax[block] < 1e-38f ? 1e-38f : absmax[block]));
        for (int64_t i = start; i < start + block_size; i += 16) {
            const Pair values = load_pair<DTYPE>(w, i);
            const __m256i even =
                search_tree(_mm256_mul_ps(values.even, inverse), upper_nodes, lower_nodes, root);
            const __m256i odd =
                search_tree(_mm256_mul_ps(values.odd, inverse), upper_nodes, lower_nodes, root);
            const __m256i bytes =
                _mm256_or_si256(_mm256_shuffle_epi8(high_code, even), _mm256_shuffle_epi8(low_code, odd));
            const __m256i gathered = _mm256_shuffle_epi8(bytes, lowest);
            _mm_storel_epi64(
                reinterpret_cast<__m128i*>(codes + i / 2),
                _mm_unpacklo_epi32(_mm256_castsi256_si128(gathered), _mm256_extracti128_si256(gathered, 1)));
        }
    }
}

void dequantize_fp32(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                     const float* codebook, float* out) {
    for (int64_t block = 0; block < blocks; ++block) {
        const Table table = scaled_table(codebook, absmax[block]);
        const int64_t start = block * block_size;
        for (int64_t i = start; i < start + block_size; i += 8) {
            int32_t four;
            std::memcpy(&four, codes + i / 2, 4);
            const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            _mm256_storeu_ps(out + i,
                             table[_mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32))]);
        }
    }
}

// The 16 rounded values as two tables of bytes, which a byte shuffle looks up 32 at a time.
template <int DTYPE>
void dequantize_half(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                     const float* codebook, uint16_t* out) {
    const __m128i byte_mask = _mm_set1_epi16(0xff);
    for (int64_t block = 0; block < blocks; ++block) {
        const Table scaled = scaled_table(codebook, absmax[block]);
        const __m128i first = round_to_half<DTYPE>(scaled.low), second = round_to_half<DTYPE>(scaled.high);
        const __m256i lower = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_and_si128(first, byte_mask), _mm_and_si128(second, byte_mask)));
        const __m256i upper = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
        const int64_t start = block * block_size;
        for (int64_t i = start; i < start + block_size; i += 32) {
            const __m256i byte =
                _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
            const __m256i low_nibble =
                _mm256_and_si256(_mm256_slli_epi16(byte, 8), _mm256_set1_epi16(0x0f00));
            const __m256i index = _mm256_or_si256(_mm256_srli_epi16(byte, 4), low_nibble);
            const __m256i low = _mm256_shuffle_epi8(lower, index), high = _mm256_shuffle_epi8(upper, index);
            const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
            store(out + i, _mm256_permute2x128_si256(even, odd, 0x20));
            store(out + i + 16, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    }
}

}  // namespace

namespace avx2 {

void quantize(const void* w, int dtype, int64_t blocks, int64_t block_size, const Search& search,
              uint8_t* codes, float* absmax) {
    if (dtype == FP32) quantize_blocks<FP32>(w, blocks, block_size, search, codes, absmax);
    if (dtype == BF16) quantize_blocks<BF16>(w, blocks, block_size, search, codes, absmax);
    if (dtype == FP16) quantize_blocks<FP16>(w, blocks, block_size, search, codes, absmax);
}

void dequantize(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                const float* codebook, void* out, int dtype, bool) {
    uint16_t* half = static_cast<uint16_t*>(out);
    if (dtype == FP32) dequantize_fp32(codes, absmax, blocks, block_size, codebook, static_cast<float*>(out));
    if (dtype == BF16) dequantize_half<BF16>(codes, absmax, blocks, block_size, codebook, half);
    if (dtype == FP16) dequantize_half<FP16>(codes, absmax, blocks, block_size, codebook, half);
}

bool has_nonfinite(const void* w, int dtype, int64_t n) {
    __m256i found = _mm256_setzero_si256();
    int64_t i = 0;
    if (dtype == FP32) {
        const __m256i exponent = _mm256_set1_epi32(0x7f800000);
        for (; i + 8 <= n; i += 8) {
            const __m256i bits = _mm256_and_si256(load(static_cast<const float*>(w) + i), exponent);
            found = _mm256_or_si256(found, _mm256_cmpeq_epi32(bits, exponent));
        }
    } else {
        const __m256i exponent = _mm256_set1_epi16(dtype == BF16 ? 0x7f80 : 0x7c00);
        for (; i + 16 <= n; i += 16) {
            const __m256i bits = _mm256_and_si256(load(static_cast<const uint16_t*>(w) + i), exponent);
            found = _mm256_or_si256(found, _mm256_cmpeq_epi16(bits, exponent));
        }
    }
    const char* rest = static_cast<const char*>(w) + i * dtype_bytes(dtype);
    return !_mm256_testz_si256(found, found) || scalar::has_nonfinite(rest, dtype, n - i);
}

}  // namespace avx2
