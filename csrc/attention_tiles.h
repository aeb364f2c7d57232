// What the two passes of attention share: tiles of keys, strips of scores, masks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "exponential.h"
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int64_t TILE = ATTENTION_TILE;
// Instead of -inf, whose differences are NaN.
constexpr float UNSEEN = -1e30f;

// Cuts scratch memory into arrays; of address 0 it says how much they take.
class Cutter {
  public:
    explicit Cutter(const char* room) : at(reinterpret_cast<uintptr_t>(room)) {}

    template <class T>
    T* take(int64_t count) {
        T* found = reinterpret_cast<T*>(at);
        at += (uintptr_t(count) * sizeof(T) + 63) / 64 * 64;
        return found;
    }

    int64_t end() const { return int64_t(at); }

  private:
    uintptr_t at;
};

// Does a number of rows, and between them, evenly, a number of units. Products are such units: Intel's matrix unit falls
// asleep after 0.3 us without one, and takes as long to wake (docs/log.md).
template <class Row, class Unit>
inline void alternate(int64_t rows, const Row& row, int64_t units, const Unit& unit) {
    int64_t done = 0;
    for (int64_t i = 0; i < rows; ++i) {
        for (; done < units && done * rows <= i * units; ++done) unit(done);
        row(i);
    }
    for (; done < units; ++done) unit(done);
}

template <class Math>
struct AttentionTiles {
    using Operand = typename Math::Operand;

    static int64_t padded(int64_t width) { return (width + Math::WIDTH_STEP - 1) / Math::WIDTH_STEP * Math::WIDTH_STEP; }

    // `rows` operand rows of `padded(width)` of x, zeros beyond count and width.
    static void read_rows(const AttentionTensor& x, int dtype, int64_t row, int64_t count, int64_t width, int64_t rows,
                          Operand* out) {
        const int64_t wide = padded(width);
        for (int64_t i = 0; i < rows; ++i, out += wide) {
            int64_t d = 0;
            if (i < count) {
                const char* source = static_cast<const char*>(x.data) + (row + i) * x.row_bytes;
                Math::convert(source, dtype, width, out);
                d = width;
            }
            for (; d < wide; ++d) out[d] = Operand(0);
        }
    }

    // Products are made in parts of Math::PART columns; so many they are.
    static int64_t parts(int64_t columns) { return (columns + Math::PART - 1) / Math::PART; }

    // The first tile of keys that queries row to row + count see.
    static int64_t first_tile(const AttentionHead& h, int64_t row, int64_t count) {
        int64_t least = row;
        for (int64_t i = 0; i < count; ++i) least = std::min<int64_t>(least, h.first[row + i]);
        return least / TILE;
    }

    // Whether each of `count` queries sees every key of a tile: then the scores may be scaled in their exponentials.
    static bool all_seen(const AttentionHead& h, int64_t row, int64_t count, int64_t key) {
        if (key + TILE - 1 > row || h.scale <= 0) return false;
        for (int64_t i = 0; i < count; ++i)
            if (h.first[row + i] > key) return false;
        return true;
    }

    // s = scale s, and UNSEEN where a query does not see a key.
    static void scale_and_mask(const AttentionHead& h, int64_t row, int64_t count, int64_t key, float* s) {
        for (int64_t i = 0; i < count; ++i) {
            float* line = s + i * TILE;
            for (int64_t j = 0; j < TILE; ++j) line[j] *= h.scale;
            const int64_t from = std::clamp<int64_t>(h.first[row + i] - key, 0, TILE);
            const int64_t to = std::clamp<int64_t>(row + i - key + 1, 0, TILE);
            for (int64_t j = 0; j < from; ++j) line[j] = UNSEEN;
            for (int64_t j = to; j < TILE; ++j) line[j] = UNSEEN;
        }
    }

    static void write_rows(const float* from, int64_t wide, const AttentionTensor& to, int dtype, int64_t row,
                           int64_t count, int64_t width) {
        with_dtype(dtype, [&](auto known) {
            for (int64_t i = 0; i < count; ++i) {
                char* out = static_cast<char*>(to.data) + (row + i) * to.row_bytes;
                for (int64_t d = 0; d < width; ++d) store_as<known>(out, d, from[i * wide + d]);
            }
        });
    }
};

}  // namespace
