// What attention's `Math` is made of: the passes over scores, and products of fp32 operands.
#pragma once

#include "attention.h"

namespace {

// The passes over scores, for operands that are fp32 (`Operand` float) or bf16 (uint16_t).
template <class Operand>
inline Operand to_operand(float value) {
    if constexpr (sizeof(Operand) == 4) return value;
    const uint32_t bits = bits_of(value);  // finite
    return Operand((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

template <class Operand>
struct Passes {
    static void convert(const void* source, int dtype, int64_t n, Operand* out) {
        if (sizeof(Operand) == 2 && dtype == BF16) {
            std::memcpy(out, source, size_t(n) * 2);
        } else {
            for (int64_t i = 0; i < n; ++i) out[i] = to_operand<Operand>(load_value(source, dtype, i));
        }
    }

    // x [rows, columns] to [columns, rows]
    template <class Value>
    static void transpose(const Value* x, int64_t rows, int64_t columns, Value* out) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
    }

    static float highest(const float* s) {
        float lanes[16];
        for (int lane = 0; lane < 16; ++lane) lanes[lane] = s[lane];
        for (int64_t j = 16; j < TILE; j += 16)
            for (int lane = 0; lane < 16; ++lane) lanes[lane] = std::max(lanes[lane], s[j + lane]);
        return *std::max_element(lanes, lanes + 16);
    }

    // p = exp(scale s - highest), rounded; returns the fp32 sum.
    static float exponentials(const float* s, float scale, float highest, Operand* p) {
        float values[TILE], lanes[16] = {};
        for (int64_t j = 0; j < TILE; ++j) {
            values[j] = s[j] <= UNSEEN ? 0.0f : exponential(s[j] * scale - highest);
            p[j] = to_operand<Operand>(values[j]);
        }
        for (int64_t j = 0; j < TILE; j += 16)
            for (int lane = 0; lane < 16; ++lane) lanes[lane] += values[j + lane];
        float sum = 0;
        for (const float lane : lanes) sum += lane;
        return sum;
    }

    // p = exp(score_scale s - lse), ds = scale p (dp - inner) of a row.
    static void gradients_of_row(const float* s, float score_scale, const float* dp, float lse, float inner,
                                 float scale, Operand* p, Operand* ds) {
        for (int64_t j = 0; j < TILE; ++j) {
            const float value = s[j] <= UNSEEN ? 0.0f : exponential(s[j] * score_scale - lse);
            p[j] = to_operand<Operand>(value);
            ds[j] = to_operand<Operand>(value * (dp[j] - inner) * scale);
        }
    }
};

struct OneScope {
    struct Scope {};
};

// fp32 operands in vectors V. B is packed as it lies: [k, n].
template <class V>
struct WideMath : Passes<float>, OneScope {
    using Operand = float;
    static constexpr int64_t WIDTH_STEP = 16, PART = 64;
    static constexpr int64_t FORWARD_QUERIES = 64, BACKWARD_QUERIES = 64;

    static void pack(const float* rows, int64_t wide, float* out) {
        std::memcpy(out, rows, size_t(TILE * wide) * sizeof(float));
    }

    // Of two rows; p and ds_packed as `pack` leaves them.
    static void gradients(const float* s, float score_scale, const float* dp, const float* lse, const float* inner,
                          float scale, float* p, float* ds, float* ds_packed) {
        for (int row = 0; row < 2; ++row) {
            const int64_t line = row * TILE;
            gradients_of_row(s + line, score_scale, dp + line, lse[row], inner[row], scale, p + line, ds + line);
        }
        std::memcpy(ds_packed, ds, 2 * TILE * sizeof(float));
    }

    // rows [TILE, wide] to [wide, TILE]
    static void pack_transposed(const float* rows, int64_t wide, float* out) {
        transpose(rows, TILE, wide, out);
    }

    // Columns part PART to part PART + PART of c [m, n] (+)= a [m, k] b [k, n]; m and n are multiples of 16.
    static void product(const float* a, int64_t m, int64_t k, const float* b, int64_t n, int64_t part, float* c,
                        bool add) {
        int64_t j = part * PART;
        const int64_t end = std::min(n, j + PART);
        for (; j + V::COLUMNS <= end; j += V::COLUMNS) columns<V::VECTORS>(a, m, k, b + j, n, c + j, add);
        for (; j < end; j += 16) columns<16 / V::WIDTH>(a, m, k, b + j, n, c + j, add);
    }

    template <int VECTORS>
    static void columns(const float* a, int64_t m, int64_t k, const float* b, int64_t n, float* c, bool add) {
        constexpr int ROWS = V::ROWS;
        static_assert(16 % ROWS == 0, "sixteen rows are cut into whole registers");
        for (int64_t i = 0; i < m; i += ROWS) {
            typename V::Vector sums[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v] = add ? V::load(c + (i + r) * n + v * V::WIDTH) : V::zero();
            for (int64_t kk = 0; kk < k; ++kk) {
                typename V::Vector line[VECTORS];
                for (int v = 0; v < VECTORS; ++v) line[v] = V::load(b + kk * n + v * V::WIDTH);
                for (int r = 0; r < ROWS; ++r) {
                    const typename V::Vector x = V::broadcast(a + (i + r) * k + kk);
                    for (int v = 0; v < VECTORS; ++v) sums[r][v] = V::fma(x, line[v], sums[r][v]);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) V::store(c + (i + r) * n + v * V::WIDTH, sums[r][v]);
        }
    }
};

}  // namespace
