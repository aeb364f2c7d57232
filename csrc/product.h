// The inner kernel of the many-row product (product.cpp) for any vector type:
//
//   V::Vector, V::LANES       of 32 bits; a panel has two vectors
//   V::ROWS                   of a tile; sums, two vectors and a word of x fill the registers
//   V::load, V::store, V::plus, V::zero   fp32 lanes
//   V::add_products(s, a, w)  s + a w, a and w being words
#pragma once

#include <cstring>

#include "kernels.h"
#include "unroll.h"

namespace {

// Vectors are slower than the last cache.
constexpr int64_t TILES_BYTES = 4 << 20;

template <class V, int ROWS>
void multiply_tile(const uint32_t* tile, const uint32_t* panel, int64_t count, bool add, float* sums) {
    typename V::Vector acc[ROWS][2];
    unroll<ROWS>([&](auto r) {
        unroll<2>([&](auto j) { acc[r][j] = V::zero(); });
    });
    for (int64_t w = 0; w < count; ++w) {
        const auto first = V::words(panel + 2 * V::LANES * w);
        const auto second = V::words(panel + 2 * V::LANES * w + V::LANES);
        unroll<ROWS>([&](auto r) {
            const auto x = V::everywhere(tile[ROWS * w + r]);
            acc[r][0] = V::add_products(acc[r][0], x, first);
            acc[r][1] = V::add_products(acc[r][1], x, second);
        });
    }
    // A panel is summed for itself and then added: sums of sums round less than one long sum.
    unroll<ROWS>([&](auto r) {
        unroll<2>([&](auto j) {
            float* at = sums + (2 * r + j) * V::LANES;
            V::store(at, add ? V::plus(V::load(at), acc[r][j]) : acc[r][j]);
        });
    });
}

// The last tile of x is a third, two thirds or the whole of ROWS high.
template <class V>
int64_t tile_height(int64_t rows) {
    constexpr int64_t STEP = V::ROWS / 3;
    return (rows + STEP - 1) / STEP * STEP;
}

template <class V>
void multiply_words(const uint32_t* tiles, int64_t rows, int64_t words, int64_t start, int64_t count,
                    const uint32_t* panel, bool add, float* sums) {
    for (int64_t row = 0; row < rows; row += V::ROWS, sums += 2 * V::LANES * V::ROWS) {
        const int64_t height = rows - row < V::ROWS ? tile_height<V>(rows - row) : V::ROWS;
        const uint32_t* tile = tiles + row * words + start * height;
        if (height == V::ROWS)
            multiply_tile<V, V::ROWS>(tile, panel, count, add, sums);
        else if (height == V::ROWS / 3)
            multiply_tile<V, V::ROWS / 3>(tile, panel, count, add, sums);
        else
            multiply_tile<V, V::ROWS / 3 * 2>(tile, panel, count, add, sums);
    }
}

// A tile [words][height], for kernels whose words need not be a multiple of anything.
template <decltype(ProductKernels::transpose) TRANSPOSE>
void pack_words(const char* lines, int64_t bytes, int64_t n, int64_t words, int64_t height, uint32_t* tile) {
    const int64_t whole = bytes / 4;
    TRANSPOSE(lines, bytes, n, whole, tile, height);
    if (whole == words) return;
    uint32_t* last = tile + whole * height;
    std::memset(last, 0, size_t(4 * height));
    for (int64_t r = 0; r < n; ++r) std::memcpy(last + r, lines + r * bytes + 4 * whole, size_t(bytes - 4 * whole));
}

}  // namespace
