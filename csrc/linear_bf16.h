// What the few-row products of bf16, AVX-512 BF16's and AMX's, share: weights of a chunk as they lie.
//
// A vector of 64 bytes holds 128 weights. Shifted by 0, 4, 8 and 12 bits, the low nibble of every 16-bit
// word indexes a permute of a table: x stands in the same order, so nothing is unpacked. The table holds the
// values of the vector's blocks, codebook times scale, rounded to bf16: the very weights that restoring to
// bf16 gives.
#pragma once

#include "kernels.h"
#include "simd_avx512.h"
#include "unroll.h"

namespace {

constexpr int64_t CHUNK = 128;

inline __mmask32 first_words(int64_t count) {
    return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

inline __m512bh as_bf16(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// The 16 values of each of the blocks, 1, 2 or 4, that share a chunk.
template <int BLOCKS>
struct Table {
    __m512i first, second;
};

// Calls work with the number of blocks that share a chunk, as a type.
template <class Work>
inline void with_blocks(int64_t block_size, const Work& work) {
    if (block_size == 32) return work(std::integral_constant<int, 4>());
    if (block_size == 64) return work(std::integral_constant<int, 2>());
    work(std::integral_constant<int, 1>());
}

// `left` of the scales exist, all of them in a `FULL` chunk; x is zero beyond.
template <int BLOCKS, bool FULL>
inline Table<BLOCKS> make_table(__m512 codebook, const float* absmax, int64_t left) {
    const auto scaled = [&](int i) {
        return _mm512_mul_ps(codebook, _mm512_set1_ps(FULL || i < left ? absmax[i] : 0.0f));
    };
    const auto pair = [&](int low, int high) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled(high), scaled(low)));
    };
    if constexpr (BLOCKS == 4) return {pair(0, 1), pair(2, 3)};
    return {pair(0, BLOCKS - 1), _mm512_setzero_si512()};
}

// By the low nibble of each word, in the block that the word belongs to.
template <int BLOCKS>
inline __m512bh look_up(const Table<BLOCKS>& table, __m512i words) {
    // A permute of 32 values reads five bits; a single block's values are there twice.
    if constexpr (BLOCKS == 1) return as_bf16(_mm512_permutexvar_epi16(words, table.first));
    // Of 32 words the first 16 belong to the first of two blocks; the first 8 to the first of four.
    constexpr int64_t EACH = 0x0010001000100010;
    const __m512i block = BLOCKS == 2
                              ? _mm512_set_epi64(EACH, EACH, EACH, EACH, 0, 0, 0, 0)
                              : _mm512_set_epi64(3 * EACH, 3 * EACH, 2 * EACH, 2 * EACH, EACH, EACH, 0, 0);
    // 0xf8: first | (second & third).
    const __m512i index = _mm512_ternarylogic_epi64(block, words, _mm512_set1_epi16(15), 0xf8);
    if constexpr (BLOCKS == 2) return as_bf16(_mm512_permutexvar_epi16(index, table.first));
    return as_bf16(_mm512_permutex2var_epi16(table.first, index, table.second));
}

}  // namespace
