// The few-row product of bf16 activations with AMX; one row, and other dtypes, take linear_avx512bf16.cpp.
//
// Sixteen weight rows of a chunk (linear_bf16.h) are four left tiles as they are looked up; x stands in their order,
// by pairs of values and sixteen rows of x (`turn`), as right tiles do. So nothing of a weight is transposed, and two
// rows take as long as sixteen. Subnormal values count as zero. The order of summation does not depend on M.
#include <cstring>

#include "amx.h"
#include "linear_bf16.h"
#include "product_avx512.h"

namespace {

constexpr int64_t TILE_SIZE = TILE_ROWS * TILE_BYTES;

// tiles [4][16 rows][32 values] of the chunk from k on.
template <int BLOCKS, bool FULL>
inline void look_up_rows(const LinearRows& rows, int64_t n, int64_t count, int64_t k, char* tiles) {
    const int64_t row_blocks = rows.K / rows.block_size, block = k / rows.block_size;
    const __m512 codebook = _mm512_loadu_ps(rows.codebook);
    const __mmask32 inside = FULL ? ~__mmask32(0) : first_words((rows.K - k) / 4);
    for (int64_t r = 0; r < count; ++r, tiles += TILE_BYTES) {
        const uint8_t* at = rows.codes + ((n + r) * rows.K + k) / 2;
        const float* absmax = rows.absmax + (n + r) * row_blocks + block;
        _mm_prefetch(reinterpret_cast<const char*>(at + TILE_ROWS * rows.K / 2), _MM_HINT_T1);
        const __m512i words = _mm512_maskz_loadu_epi16(inside, at);
        const Table<BLOCKS> table = make_table<BLOCKS, FULL>(codebook, absmax, row_blocks - block);
        unroll<4>([&](auto j) {
            const __m512bh found = look_up(table, _mm512_srli_epi16(words, 4 * j));
            _mm512_store_si512(tiles + j * TILE_SIZE, reinterpret_cast<__m512i>(found));
        });
    }
}

// Adds to the sums of HALVES of 16 rows of x, in tiles 0 and 2, the product of a left tile and theirs.
template <int HALVES>
inline void add_even(const char* left, const float* x, int64_t half) {
    _tile_loadd(4, left, TILE_BYTES);
    _tile_loadd(6, x, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (HALVES == 2) {
        _tile_loadd(6, x + half, TILE_BYTES);
        _tile_dpbf16ps(2, 4, 6);
    }
}

// The same in tiles 1 and 3, so that no product waits for the one before.
template <int HALVES>
inline void add_odd(const char* left, const float* x, int64_t half) {
    _tile_loadd(5, left, TILE_BYTES);
    _tile_loadd(7, x, TILE_BYTES);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (HALVES == 2) {
        _tile_loadd(7, x + half, TILE_BYTES);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// y [M from m on][n ..] = the sum of both tiles' sums, [16 weight rows][16 rows of x].
inline void store_sums(const float* even, const float* odd, const LinearRows& rows, int64_t m, int64_t n) {
    __m512i each[16], turned[16];
    unroll<16>([&](auto r) {
        each[r] = _mm512_castps_si512(_mm512_add_ps(_mm512_load_ps(even + 16 * r), _mm512_load_ps(odd + 16 * r)));
    });
    transpose_16(each, turned);
    const __mmask16 inside = first_lanes(rows.rows - n);
    unroll<16>([&](auto i) {
        if (m + i < rows.M) _mm512_mask_storeu_epi32(rows.y + (m + i) * rows.rows + n, inside, turned[i]);
    });
}

template <int BLOCKS, int HALVES>
void multiply_rows(const LinearRows& rows, int64_t n) {
    // In turn, so that a chunk is looked up while the one before is multiplied.
    alignas(64) char tiles[2][4 * TILE_SIZE];
    const int64_t count = rows.rows - n < TILE_ROWS ? rows.rows - n : TILE_ROWS;
    const int64_t half = TILE_ROWS * rows.x_stride;
    if (count < TILE_ROWS) std::memset(tiles, 0, sizeof(tiles));
    read_sums<2>(nullptr, 0, false);
    for (int64_t k = 0, turn = 0; k < rows.K; k += CHUNK, turn ^= 1) {
        char* left = tiles[turn];
        if (k + CHUNK <= rows.K)
            look_up_rows<BLOCKS, true>(rows, n, count, k, left);
        else
            look_up_rows<BLOCKS, false>(rows, n, count, k, left);
        const float* x = rows.x + k / 2 * TILE_WORDS;
        for (int64_t at = 0; at < 4 * TILE_SIZE; at += 2 * TILE_SIZE) {
            add_even<HALVES>(left + at, x + at / 4, half);
            add_odd<HALVES>(left + at + TILE_SIZE, x + (at + TILE_SIZE) / 4, half);
        }
    }
    alignas(64) float sums[4][TILE_ROWS * TILE_WORDS];
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
    store_sums(sums[0], sums[1], rows, 0, n);
    if constexpr (HALVES == 2) {
        _tile_stored(2, sums[2], TILE_BYTES);
        _tile_stored(3, sums[3], TILE_BYTES);
        store_sums(sums[2], sums[3], rows, TILE_ROWS, n);
    }
}

template <int BLOCKS>
void all_rows(const LinearRows& rows) {
    const Tiles configured;
    for (int64_t n = 0; n < rows.rows; n += TILE_ROWS) {
        if (rows.M > TILE_ROWS)
            multiply_rows<BLOCKS, 2>(rows, n);
        else
            multiply_rows<BLOCKS, 1>(rows, n);
    }
}

}  // namespace

namespace amx {

void turn(const float* rows, int64_t x_stride, int64_t M, float* words) {
    transpose_lines(reinterpret_cast<const char*>(rows), x_stride * int64_t(sizeof(float)), M, x_stride / 2,
                    reinterpret_cast<uint32_t*>(words), TILE_WORDS);
}

void linear(const LinearRows& rows) {
    if (!rows.turned) return avx512bf16::linear(rows);
    with_blocks(rows.block_size, [&](auto blocks) { all_rows<decltype(blocks)::value>(rows); });
}

}  // namespace amx
