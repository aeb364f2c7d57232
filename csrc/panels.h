// Blocks of operands in the order in which the many-row product meets them.
//
// A word is 32 bits: one fp32 value, or two of bf16 that are neighbours in depth, the dimension summed over.
//
//   tile   [words][height]   some rows of the left operand
//   panel  [words][lanes]    some columns of the right one
//   sums   [height][lanes]   fp32
#pragma once

#include <algorithm>
#include <cstring>
#include <new>

#include "codec.h"
#include "convert.h"
#include "kernels.h"
#include "parallel.h"

// Memory of a thread, kept between calls; contents are lost where it grows. Null where there is none.
struct Room {
    char* data = nullptr;
    int64_t size = 0;
    ~Room() { ::operator delete(data, std::align_val_t(64)); }

    template <class T>
    T* at_least(int64_t count) {
        const int64_t wanted = std::max<int64_t>(1, count) * int64_t(sizeof(T));
        if (wanted > size) {
            ::operator delete(data, std::align_val_t(64));
            data = static_cast<char*>(::operator new(size_t(wanted), std::align_val_t(64), std::nothrow));
            size = data ? wanted : 0;
        }
        return reinterpret_cast<T*>(data);
    }
};

namespace {

// Depth of a panel in words: 32 KiB of bf16, 16 of fp32, whose longer sums would be less exact.
constexpr int64_t MOST_WORDS = 256, MOST_WIDE_WORDS = 128, MOST_LANES = 32, MOST_HEIGHT = 32;
// Bytes between lines, not a power of two: else they would all compete for the same places in the cache.
constexpr int64_t LINE_STRIDE = 4 * MOST_WORDS + 64, LINES_BYTES = MOST_LANES * LINE_STRIDE;

inline int64_t per_word(int dtype) { return dtype == FP32 ? 1 : 2; }
inline int64_t words_of(const ProductKernels& k, int64_t depth, int dtype) {
    return ceil_div(ceil_div(depth, per_word(dtype)), k.step) * k.step;
}

// Words of one panel where `words` are cut into equal ones, in steps of 32: whole vectors of codes, and of any k.step.
inline int64_t panel_words(int64_t words, int dtype) {
    const int64_t panels = ceil_div(words, dtype == FP32 ? MOST_WIDE_WORDS : MOST_WORDS);
    return ceil_div(ceil_div(words, panels), 32) * 32;
}

// Rows of a matrix that lies in memory, `depth` values each.
struct Rows {
    const void* data;
    int64_t depth;
    int dtype;

    int64_t bytes() const { return depth * dtype_bytes(dtype); }
    const char* row(int64_t i) const { return static_cast<const char*>(data) + i * bytes(); }
};

// Rows first .. first + real as a tile of `height`; what is missing is zero.
inline void pack_tile(const ProductKernels& k, const Rows& rows, int64_t first, int64_t real, int64_t height,
                      uint32_t* tile) {
    k.pack(rows.row(first), rows.bytes(), real, words_of(k, rows.depth, rows.dtype), height, tile);
}

// Words from .. count of a panel.
inline void clear_words(const ProductKernels& k, int64_t from, int64_t count, uint32_t* panel) {
    if (from < count) std::memset(panel + from * k.lanes, 0, size_t(4 * (count - from) * k.lanes));
}

// A frozen weight [N, K] in 4 bits, its scales restored.
struct Weight {
    int64_t N, K;
    const uint8_t* codes;
    const float* absmax;
    int64_t block_size;
    const float* codebook;
    int dtype;  // to which it is restored

    // count values of row n from column k on.
    void restore(int64_t n, int64_t k, int64_t count, void* out) const {
        const int64_t start = n * K + k;
        dequantize_span(codes, absmax + start / block_size, start, count, block_size, codebook, out, dtype,
                        false);
    }

    // Rows first .. first + lanes as columns of a panel, words start .. start + count of each. `lines`: scratch.
    void rows_panel(const ProductKernels& k, int64_t first, int64_t start, int64_t count, char* lines,
                    uint32_t* panel) const {
        const int64_t real = std::min(k.lanes, N - first), from = start * per_word(dtype);
        const int64_t values = std::min(count * per_word(dtype), K - from), bytes = values * dtype_bytes(dtype);
        for (int64_t lane = 0; lane < real; ++lane) {
            char* line = lines + lane * LINE_STRIDE;
            restore(first + lane, from, values, line);
            std::memset(line + bytes, 0, size_t(4 * count - bytes));
        }
        k.transpose(lines, LINE_STRIDE, real, count, panel, k.lanes);
    }

    // Columns first .. first + lanes as they are, words start .. start + count made of its rows.
    void columns_panel(const ProductKernels& k, int64_t first, int64_t start, int64_t count,
                       uint32_t* panel) const {
        const int64_t from = start * per_word(dtype), rows = std::min(count * per_word(dtype), N - from);
        const int64_t at = from * K + first, filled = ceil_div(rows, per_word(dtype));
        clear_words(k, filled, count, panel);
        if (K % block_size == 0) {
            k.columns(codes + at / 2, K / 2, absmax + at / block_size, K / block_size, rows, codebook, panel);
            return;
        }
        const int64_t width = std::min(k.lanes, K - first);
        alignas(64) char lines[2][4 * MOST_LANES] = {};
        for (int64_t w = 0; w < filled; ++w) {
            const int64_t n = from + w * per_word(dtype);
            restore(n, first, width, lines[0]);
            const bool second = dtype != FP32 && n + 1 < N;
            if (second) restore(n + 1, first, width, lines[1]);
            k.interleave(lines[0], second ? lines[1] : nullptr, ~0u, ~0u, width, panel + w * k.lanes);
        }
    }
};

// Rows, which lie too far apart for the processor to foresee them; into the second cache.
constexpr int64_t FETCHED_AHEAD = 48;

// Lanes first .. first + lanes of rows from .. from + count as they lie in memory; words are made of the rows.
// kept: bits of the values that count, [rows, mask_words], or null for all.
inline void pack_columns(const ProductKernels& k, const Rows& rows, int64_t first, int64_t from, int64_t count,
                         const uint32_t* kept, int64_t mask_words, int64_t words, uint32_t* panel) {
    const int64_t width = std::min(k.lanes, rows.depth - first), step = per_word(rows.dtype);
    const auto bits = [&](int64_t row) {
        return kept ? kept[row * mask_words + first / 32] >> (first % 32) : ~0u;
    };
    for (int64_t i = 0; i < count; i += step) {
        const bool second = step == 2 && i + 1 < count;
        const char* at = rows.row(from + i) + first * dtype_bytes(rows.dtype);
        __builtin_prefetch(at + FETCHED_AHEAD * rows.bytes(), 0, 2);
        __builtin_prefetch(at + (FETCHED_AHEAD + 1) * rows.bytes(), 0, 2);
        k.interleave(at, second ? at + rows.bytes() : nullptr, bits(from + i), second ? bits(from + i + 1) : 0u,
                     width, panel + i / step * k.lanes);
    }
    clear_words(k, ceil_div(count, step), words, panel);
}

// count values of fp32 times scale, in `dtype`.
inline void narrow(const ProductKernels& k, const float* values, int64_t count, float scale, int dtype, char* out) {
    const float none[MOST_LANES] = {};
    for (int64_t i = 0; i < count; i += k.lanes) {
        float some[MOST_LANES];
        const int64_t width = std::min(k.lanes, count - i);
        for (int64_t j = 0; j < width; ++j) some[j] = values[i + j] * scale;
        k.store(some, none, width, out + i * dtype_bytes(dtype));
    }
}

// A panel of `count` words: its lanes are `real` rows of fp32, `stride` apart, `values` of each times scale. `lines`:
// scratch for so many lines of at least `count` words, `line_stride` bytes apart.
inline void narrow_rows_panel(const ProductKernels& k, const float* rows, int64_t stride, int64_t real,
                              int64_t values, float scale, int dtype, int64_t count, char* lines,
                              int64_t line_stride, uint32_t* panel) {
    const int64_t bytes = values * dtype_bytes(dtype);
    for (int64_t lane = 0; lane < real; ++lane) {
        narrow(k, rows + lane * stride, values, scale, dtype, lines + lane * line_stride);
        std::memset(lines + lane * line_stride + bytes, 0, size_t(4 * count - bytes));
    }
    k.transpose(lines, line_stride, real, count, panel, k.lanes);
}

// A panel of `words` words, made of `count` rows of fp32, `stride` apart, `width` values of each.
inline void narrow_columns_panel(const ProductKernels& k, const float* rows, int64_t stride, int64_t count,
                                 int64_t width, int dtype, int64_t words, uint32_t* panel) {
    const int64_t step = per_word(dtype);
    alignas(64) char lines[2][4 * MOST_LANES];
    for (int64_t i = 0; i < count; i += step) {
        const bool second = step == 2 && i + 1 < count;
        narrow(k, rows + i * stride, width, 1.0f, dtype, lines[0]);
        if (second) narrow(k, rows + (i + 1) * stride, width, 1.0f, dtype, lines[1]);
        k.interleave(lines[0], second ? lines[1] : nullptr, ~0u, ~0u, width, panel + i / step * k.lanes);
    }
    clear_words(k, ceil_div(count, step), words, panel);
}

}  // namespace
