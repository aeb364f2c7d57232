// Causal attention in tiles of 64 queries and 64 keys (arXiv:2205.14135): source that each instruction set
// compiles with a `Math` of its own, which says how operands are held and multiplied. A `Math::Scope` lives while
// one thread multiplies.
//
//   forward   S = scale Q K^T,  P = softmax(S),  O = P V,  lse = log sum exp S
//   backward  P = exp(S - lse), dP = dO V^T, dS = scale P (dP - rowsum(dO O)),
//             dQ = dS K, dK = dS^T Q, dV = P^T dO
//
// Query t sees keys first[t] to t. All products are C[m, n] = A[m, k] B[k, n] with A in rows and B packed;
// sums are fp32. P and dS are rounded to the operand type, nothing else is.
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

template <class Math>
struct Attention {
    using Operand = typename Math::Operand;
    static constexpr int64_t MAX_WIDTH = ATTENTION_MAX_WIDTH;

    static int64_t padded(int64_t width) { return (width + Math::WIDTH_STEP - 1) / Math::WIDTH_STEP * Math::WIDTH_STEP; }

    // Rows of x as operand rows of `padded(width)`, zeros beyond count and width.
    static void read_rows(const AttentionTensor& x, int dtype, int64_t row, int64_t count, int64_t width, Operand* out) {
        const int64_t wide = padded(width);
        for (int64_t i = 0; i < TILE; ++i, out += wide) {
            int64_t d = 0;
            if (i < count) {
                const char* source = static_cast<const char*>(x.data) + (row + i) * x.row_bytes;
                Math::convert(source, dtype, width, out);
                d = width;
            }
            for (; d < wide; ++d) out[d] = Operand(0);
        }
    }

    // Scratch of one thread.
    struct Scratch {
        Operand* rows[2];     // [TILE, wide]: a tile of queries, of output gradients
        Operand* columns[2];  // [wide, TILE]: the same transposed
        Operand* p;           // [TILE, TILE], and so the others
        Operand* ds;
        Operand* packed;
        float* s;
        float* dp;
        float* acc;  // [TILE, wide]
    };

    static Scratch scratch(char* at, int64_t wide) {
        Scratch made;
        const auto take = [&](int64_t bytes) {
            char* found = at;
            at += (bytes + 63) / 64 * 64;
            return found;
        };
        for (auto& place : made.rows) place = reinterpret_cast<Operand*>(take(TILE * wide * sizeof(Operand)));
        for (auto& place : made.columns) place = reinterpret_cast<Operand*>(take(TILE * wide * sizeof(Operand)));
        for (Operand** place : {&made.p, &made.ds, &made.packed})
            *place = reinterpret_cast<Operand*>(take(TILE * TILE * sizeof(Operand)));
        for (float** place : {&made.s, &made.dp}) *place = reinterpret_cast<float*>(take(TILE * TILE * sizeof(float)));
        made.acc = reinterpret_cast<float*>(take(TILE * wide * sizeof(float)));
        return made;
    }

    // The first tile of keys that queries row to row + count see.
    static int64_t first_tile(const AttentionHead& h, int64_t row, int64_t count) {
        int64_t least = row;
        for (int64_t i = 0; i < count; ++i) least = std::min<int64_t>(least, h.first[row + i]);
        return least / TILE;
    }

    // Whether each of `count` queries sees every key of a tile.
    static bool all_seen(const AttentionHead& h, int64_t row, int64_t count, int64_t key) {
        if (key + TILE - 1 > row) return false;
        for (int64_t i = 0; i < count; ++i)
            if (h.first[row + i] > key) return false;
        return true;
    }

    // Leaves s to be scaled by what is returned, masked where not every key is seen.
    static float masked(const AttentionHead& h, int64_t row, int64_t count, int64_t key, float* s) {
        if (h.scale > 0 && all_seen(h, row, count, key)) return h.scale;
        scale_and_mask(h, row, count, key, s);
        return 1.0f;
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

    // Packs K^T (for S) and V (for O) of one key-value head: per tile of keys, wide x TILE and TILE x wide.
    static void pack_forward(const AttentionHead& h, Operand* keys, Operand* values, Operand* rows) {
        const int64_t wide = padded(h.width);
        for (int64_t row = 0; row < h.length; row += TILE, keys += TILE * wide, values += TILE * wide) {
            const int64_t count = std::min(TILE, h.length - row);
            read_rows(h.k, h.dtype, row, count, h.width, rows);
            Math::pack_transposed(rows, wide, keys);
            read_rows(h.v, h.dtype, row, count, h.width, rows);
            Math::pack(rows, wide, values);
        }
    }

    // One tile of queries of one head; `keys` and `values` as pack_forward leaves them.
    static void forward(const AttentionHead& h, int64_t row, const Operand* keys, const Operand* values, char* room) {
        [[maybe_unused]] const typename Math::Scope scope;
        const int64_t wide = padded(h.width), count = std::min(TILE, h.length - row);
        const Scratch at = scratch(room, wide);
        float top[TILE], sum[TILE];
        std::fill(top, top + TILE, UNSEEN);
        std::fill(sum, sum + TILE, 0.0f);
        std::memset(at.acc, 0, size_t(TILE * wide) * sizeof(float));
        read_rows(h.q, h.dtype, row, count, h.width, at.rows[0]);
        for (int64_t tile = first_tile(h, row, count); tile * TILE < row + count; ++tile) {
            Math::multiply(at.rows[0], TILE, wide, keys + tile * TILE * wide, TILE, at.s, false);
            const float scale = masked(h, row, count, tile * TILE, at.s);
            float highest[TILE], fade[TILE];
            for (int64_t i = 0; i < count; ++i) highest[i] = std::max(top[i], Math::highest(at.s + i * TILE) * scale);
            for (int64_t i = count; i < TILE; ++i) highest[i] = top[i];
            for (int64_t i = 0; i < TILE; ++i) fade[i] = exponential(top[i] - highest[i]);
            for (int64_t i = 0; i < count; ++i) {
                if (highest[i] > top[i])
                    for (int64_t d = 0; d < wide; ++d) at.acc[i * wide + d] *= fade[i];
                sum[i] = sum[i] * fade[i] + Math::exponentials(at.s + i * TILE, scale, highest[i], at.p + i * TILE);
            }
            std::copy(highest, highest + TILE, top);
            for (int64_t i = count; i < TILE; ++i) std::memset(at.p + i * TILE, 0, TILE * sizeof(Operand));
            Math::multiply(at.p, TILE, TILE, values + tile * TILE * wide, wide, at.acc, true);
        }
        for (int64_t i = 0; i < count; ++i) {
            const float share = 1.0f / sum[i];
            for (int64_t d = 0; d < h.width; ++d) at.acc[i * wide + d] *= share;
            h.lse[row + i] = top[i] + std::log(sum[i]);
        }
        write_rows(at.acc, wide, h.o, h.dtype, row, count, h.width);
    }

    // All of one key-value head: dK, dV and the dQ of its `group` query heads, heads[0] to heads[group - 1].
    // `packs` holds three packs of the whole head, `sums` fp32 [2, tiles, wide, TILE], dq [TILE, wide].
    static void backward(const AttentionHead* heads, int64_t group, Operand* packs, float* sums, float* dq, char* room) {
        [[maybe_unused]] const typename Math::Scope scope;
        const AttentionHead& kv = heads[0];
        const int64_t wide = padded(kv.width), tiles = (kv.length + TILE - 1) / TILE, all = tiles * TILE * wide;
        const Scratch at = scratch(room, wide);
        Operand *keys_t = packs, *keys = packs + all, *values_t = packs + 2 * all;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = tile * TILE, count = std::min(TILE, kv.length - row);
            read_rows(kv.k, kv.dtype, row, count, kv.width, at.rows[0]);
            Math::pack_transposed(at.rows[0], wide, keys_t + row * wide);
            Math::pack(at.rows[0], wide, keys + row * wide);
            read_rows(kv.v, kv.dtype, row, count, kv.width, at.rows[0]);
            Math::pack_transposed(at.rows[0], wide, values_t + row * wide);
        }
        float *dk = sums, *dv = sums + all;
        std::memset(sums, 0, size_t(2 * all) * sizeof(float));
        for (int64_t g = 0; g < group; ++g) {
            const AttentionHead& h = heads[g];
            for (int64_t row = 0; row < h.length; row += TILE) {
                const int64_t count = std::min(TILE, h.length - row);
                float inner[TILE];
                read_rows(h.q, h.dtype, row, count, h.width, at.rows[0]);
                read_rows(h.grad, h.dtype, row, count, h.width, at.rows[1]);
                for (int side : {0, 1}) transpose(at.rows[side], TILE, wide, at.columns[side]);
                for (int64_t i = 0; i < count; ++i) inner[i] = row_product(h, row + i);
                std::memset(dq, 0, size_t(TILE * wide) * sizeof(float));
                for (int64_t tile = first_tile(h, row, count); tile * TILE < row + count; ++tile) {
                    const int64_t key = tile * TILE;
                    Math::multiply(at.rows[0], TILE, wide, keys_t + key * wide, TILE, at.s, false);
                    Math::multiply(at.rows[1], TILE, wide, values_t + key * wide, TILE, at.dp, false);
                    const float scale = masked(h, row, count, key, at.s);
                    for (int64_t i = 0; i < count; ++i)
                        Math::gradients(at.s + i * TILE, scale, at.dp + i * TILE, h.lse[row + i], inner[i], h.scale,
                                        at.p + i * TILE, at.ds + i * TILE);
                    for (int64_t i = count; i < TILE; ++i) {
                        std::memset(at.p + i * TILE, 0, TILE * sizeof(Operand));
                        std::memset(at.ds + i * TILE, 0, TILE * sizeof(Operand));
                    }
                    Math::multiply(at.ds, TILE, TILE, keys + key * wide, wide, dq, true);
                    // Transposed, dV^T = dO^T P and dK^T = Q^T dS: what changes from tile to tile is packed,
                    // which is cheap, and what is transposed stays for all tiles.
                    Math::pack(at.p, TILE, at.packed);
                    Math::multiply(at.columns[1], wide, TILE, at.packed, TILE, dv + key * wide, true);
                    Math::pack(at.ds, TILE, at.packed);
                    Math::multiply(at.columns[0], wide, TILE, at.packed, TILE, dk + key * wide, true);
                }
                write_rows(dq, wide, h.dq, h.dtype, row, count, h.width);
            }
        }
        for (int64_t row = 0; row < kv.length; row += TILE) {
            const int64_t count = std::min(TILE, kv.length - row);
            transpose(dk + row * wide, wide, TILE, at.acc);
            write_rows(at.acc, wide, kv.dk, kv.dtype, row, count, kv.width);
            transpose(dv + row * wide, wide, TILE, at.acc);
            write_rows(at.acc, wide, kv.dv, kv.dtype, row, count, kv.width);
        }
    }

    // x [rows, columns] to [columns, rows]
    template <class Value>
    static void transpose(const Value* x, int64_t rows, int64_t columns, Value* out) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
    }

    static float row_product(const AttentionHead& h, int64_t row) {
        const char* grad = static_cast<const char*>(h.grad.data) + row * h.grad.row_bytes;
        const char* out = static_cast<const char*>(h.o.data) + row * h.o.row_bytes;
        return with_dtype(h.dtype, [&](auto dtype) {
            return lane_sum(h.width, [&](int64_t d) { return load_as<dtype>(grad, d) * load_as<dtype>(out, d); });
        });
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

// What an instruction set exports; see kernels.h.
template <class Math>
struct AttentionExport {
    using Operand = typename Math::Operand;

    static void pack(const AttentionHead& h, void* keys, void* values, char* room) {
        Attention<Math>::pack_forward(h, static_cast<Operand*>(keys), static_cast<Operand*>(values),
                                      reinterpret_cast<Operand*>(room));
    }

    static void forward(const AttentionHead& h, int64_t row, const void* keys, const void* values, char* room) {
        Attention<Math>::forward(h, row, static_cast<const Operand*>(keys), static_cast<const Operand*>(values), room);
    }

    static void backward(const AttentionHead* heads, int64_t group, void* packs, float* sums, float* dq, char* room) {
        Attention<Math>::backward(heads, group, static_cast<Operand*>(packs), sums, dq, room);
    }

    static constexpr AttentionKernels kernels = {sizeof(Operand), Math::WIDTH_STEP, pack, forward, backward};
};

}  // namespace
