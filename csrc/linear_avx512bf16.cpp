// The few-row product of bf16 activations with AVX-512 BF16; other dtypes take linear_avx512.cpp.
//
// vdpbf16ps multiplies a vector's weights (linear_bf16.h) word by word and adds pairs. Subnormal weights count as
// zero. The order of summation does not depend on M.
#include "linear_bf16.h"

namespace {

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
    with_blocks(rows.block_size, [&](auto blocks) { all_rows<decltype(blocks)::value>(rows); });
}

}  // namespace avx512bf16
