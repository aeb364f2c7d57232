// The few-row product of bf16 activations with AVX-512 BF16; other dtypes take linear_avx512.cpp.
//
// A vector of 64 bytes holds 128 weights. Shifted by 0, 4, 8 and 12 bits, the low nibble of every 16-bit
// word indexes a permute of a table, and vdpbf16ps multiplies word by word and adds pairs: x stands in
// the same order, so nothing is unpacked. The table holds the values of the vector's blocks, codebook
// times scale, rounded to bf16: the very weights that restoring to bf16 gives. (Subnormal ones count as
// zero.) The order of summation does not depend on M.
#include "convert.h"
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

// `left` of the scales exist, all of them in a `FULL` chunk; x is zero beyond.
template <int BLOCKS, bool FULL>
Table<BLOCKS> make_table(__m512 codebook, const float* absmax, int64_t left) {
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
__m512bh look_up(const Table<BLOCKS>& table, __m512i words) {
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

template <int BLOCKS, int ROWS, int M>
void tile(const LinearRows& rows, int64_t n, int64_t m) {
    const int64_t K = rows.K, row_blocks = K / rows.block_size;
    const uint8_t* codes = rows.codes + n * K / 2;
    const float* absmax = rows.absmax + n * row_blocks;
    const float* x = rows.x + m * rows.x_stride;
    const __m512 codebook = _mm512_loadu_ps(rows.codebook);
    const int block_shift = __builtin_ctzll(uint64_t(rows.block_size));
    __m512 sums[ROWS][M];
    unroll<ROWS>([&](auto r) { unroll<M>([&](auto i) { sums[r][i] = _mm512_setzero_ps(); }); });

    const auto chunk = [&](int64_t k, auto full) {
        constexpr bool FULL = decltype(full)::value;
        const int64_t block = k >> block_shift;
        const __mmask32 inside = FULL ? ~__mmask32(0) : first_words((K - k) / 4);
        Table<BLOCKS> tables[ROWS];
        __m512i words[ROWS];
        unroll<ROWS>([&](auto r) {
            const uint8_t* at = codes + (r * K + k) / 2;
            _mm_prefetch(reinterpret_cast<const char*>(at + ROWS * K / 2), _MM_HINT_T1);
            words[r] = _mm512_maskz_loadu_epi16(inside, at);
            tables[r] = make_table<BLOCKS, FULL>(codebook, absmax + r * row_blocks + block, row_blocks - block);
        });
        unroll<4>([&](auto j) {
            __m512bh values[M];
            unroll<M>([&](auto i) {
                values[i] = as_bf16(_mm512_loadu_si512(x + i * rows.x_stride + k / 2 + 16 * j));
            });
            unroll<ROWS>([&](auto r) {
                const __m512bh weights = look_up(tables[r], _mm512_srli_epi16(words[r], 4 * j));
                unroll<M>([&](auto i) { sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weights, values[i]); });
            });
        });
    };
    int64_t k = 0;
    for (; k + CHUNK <= K; k += CHUNK) chunk(k, std::true_type());
    if (k < K) chunk(k, std::false_type());
    unroll<ROWS>([&](auto r) {
        unroll<M>([&](auto i) { rows.y[(m + i) * rows.rows + n + r] = _mm512_reduce_add_ps(sums[r][i]); });
    });
}

// All weight rows against M rows of x.
template <int BLOCKS, int ROWS, int M>
void stripe(const LinearRows& rows, int64_t m) {
    int64_t n = 0;
    for (; n + ROWS <= rows.rows; n += ROWS) tile<BLOCKS, ROWS, M>(rows, n, m);
    for (; n < rows.rows; ++n) tile<BLOCKS, 1, M>(rows, n, m);
}

template <int BLOCKS>
void all_rows(const LinearRows& rows) {
    int64_t m = 0;
    for (; m + 8 <= rows.M; m += 8) stripe<BLOCKS, 2, 8>(rows, m);
    if (rows.M - m >= 4) stripe<BLOCKS, 4, 4>(rows, m), m += 4;
    if (rows.M - m == 3) stripe<BLOCKS, 4, 3>(rows, m);
    if (rows.M - m == 2) stripe<BLOCKS, 4, 2>(rows, m);
    if (rows.M - m == 1) stripe<BLOCKS, 8, 1>(rows, m);
}

}  // namespace

namespace avx512bf16 {

// Word i of vector j of a chunk is element 4 i + (1, 0, 3, 2)[j]: the order of nibbles in a 16-bit word
// whose first element is in the high nibble of its first byte. Past K there are zeros.
void prepare(const void* x, int dtype, int64_t K, float* prepared) {
    if (dtype != BF16) return avx512::prepare(x, dtype, K, prepared);
    const uint16_t* source = static_cast<const uint16_t*>(x);
    // The first elements of the sixteen fours in two vectors.
    const __m512i fours = _mm512_slli_epi32(
        _mm512_cvtepi16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)), 2);
    for (int64_t k = 0; k < K; k += CHUNK) {
        __m512i vectors[4];
        for (int j = 0; j < 4; ++j)
            vectors[j] = _mm512_maskz_loadu_epi16(first_words(K - k - 32 * j), source + k + 32 * j);
        for (int j = 0; j < 4; ++j) {
            const __m512i element = _mm512_add_epi32(fours, _mm512_set1_epi32(j ^ 1));
            const __m512i index = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(element));
            const __m256i first =
                _mm512_castsi512_si256(_mm512_permutex2var_epi16(vectors[0], index, vectors[1]));
            const __m256i second =
                _mm512_castsi512_si256(_mm512_permutex2var_epi16(vectors[2], index, vectors[3]));
            _mm512_storeu_si512(prepared + (k + 32 * j) / 2,
                                _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
        }
    }
}

void linear(const LinearRows& rows) {
    if (rows.dtype != BF16) return avx512::linear(rows);
    if (rows.block_size == 32)
        all_rows<4>(rows);
    else if (rows.block_size == 64)
        all_rows<2>(rows);
    else
        all_rows<1>(rows);
}

}  // namespace avx512bf16
