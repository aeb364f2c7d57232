// The backward pass of attention (attention.h).
//
// A block of queries meets one tile of keys after the other. Per tile, in strips of queries: S and dP, then P and dS, then
// dQ; then dV and dK, of all the queries at once. Those two are transposed, dV^T = dO^T P and dK^T = Q^T dS: what changes
// from tile to tile is packed as it is made, and what is transposed stays for all tiles.
#pragma once

#include "attention_tiles.h"

namespace {

template <class Math>
struct AttentionBackward {
    using Base = AttentionTiles<Math>;
    using Operand = typename Math::Operand;
    // Queries that are taken together, and rows of scores that are made and used at a time.
    static constexpr int64_t ROWS = Math::BACKWARD_QUERIES, STRIP = 32;

    // Scratch of one thread. Of scores and their gradients those of a strip and of the next; of P and dS those of a
    // tile and of the one before.
    struct Room {
        Operand *q, *grad;                       // [ROWS, wide]
        Operand *q_columns, *grad_columns;       // [wide, ROWS]
        Operand *p[2], *ds[2], *ds_packed[2];    // [ROWS, TILE], p packed too
        float *s[2], *dp[2];                     // [STRIP, TILE]
        float *dq, *rows;                        // [ROWS, wide], [TILE, wide]

        Room(const char* room, int64_t wide) {
            Cutter cutter(room);
            for (Operand** place : {&q, &grad, &q_columns, &grad_columns}) *place = cutter.take<Operand>(ROWS * wide);
            for (int i : {0, 1}) {
                for (Operand** place : {&p[i], &ds[i], &ds_packed[i]}) *place = cutter.take<Operand>(ROWS * TILE);
                for (float** place : {&s[i], &dp[i]}) *place = cutter.take<float>(STRIP * TILE);
            }
            dq = cutter.take<float>(ROWS * wide);
            rows = cutter.take<float>(TILE * wide);
            end = cutter.end();
        }

        int64_t end;
    };

    static int64_t room_bytes(int64_t width) { return Room(nullptr, Base::padded(width)).end; }

    static int64_t tiles(int64_t rows) { return (rows + TILE - 1) / TILE; }

    // Keys and values of one key-value head as operands: packs of K^T, K and V^T, each [tiles, wide, TILE].
    static void pack(const AttentionHead& kv, Operand* packs, char* room) {
        const int64_t wide = Base::padded(kv.width), all = tiles(kv.length) * TILE * wide;
        Operand* rows = Room(room, wide).q;
        for (int64_t row = 0; row < kv.length; row += TILE) {
            const int64_t count = std::min(TILE, kv.length - row);
            Base::read_rows(kv.k, kv.dtype, row, count, kv.width, TILE, rows);
            Math::pack_transposed(rows, wide, packs + row * wide);
            Math::pack(rows, wide, packs + all + row * wide);
            Base::read_rows(kv.v, kv.dtype, row, count, kv.width, TILE, rows);
            Math::pack_transposed(rows, wide, packs + 2 * all + row * wide);
        }
    }

    // Queries `first` to `last` of all heads of one key-value head: their dQ, and what they add to dK^T and dV^T in
    // sums [2, tiles(last), wide, TILE]. `first` is a multiple of ROWS; so is `last`, or it is the length.
    static void queries(const AttentionHead* heads, int64_t group, int64_t first, int64_t last, const Operand* packs,
                        float* sums, char* room) {
        [[maybe_unused]] const typename Math::Scope scope;
        const int64_t wide = Base::padded(heads[0].width), kept = tiles(last) * TILE * wide;
        std::memset(sums, 0, size_t(2 * kept) * sizeof(float));
        for (int64_t g = 0; g < group; ++g)
            for (int64_t row = first; row < last; row += ROWS)
                Block(heads[g], row, std::min(ROWS, last - row), packs, sums, sums + kept, room).run();
    }

    // dK and dV of one key-value head: the sums of the queries before `cut` and of the others.
    static void finish(const AttentionHead& kv, int64_t cut, const float* early, const float* late, char* room) {
        const int64_t wide = Base::padded(kv.width), early_all = tiles(cut) * TILE * wide;
        const int64_t late_all = tiles(kv.length) * TILE * wide;
        const Room at(room, wide);
        for (int64_t row = 0; row < kv.length; row += TILE) {
            const int64_t count = std::min(TILE, kv.length - row);
            for (int which : {0, 1}) {
                const float *first = early + which * early_all + row * wide, *second = late + which * late_all + row * wide;
                if (row < cut)
                    for (int64_t i = 0; i < TILE * wide; ++i) at.dq[i] = first[i] + second[i];
                Math::transpose(row < cut ? at.dq : second, wide, TILE, at.rows);
                Base::write_rows(at.rows, wide, which ? kv.dv : kv.dk, kv.dtype, row, count, kv.width);
            }
        }
    }

    // Up to ROWS queries of one head.
    struct Block {
        const AttentionHead& h;
        const int64_t row, count, wide, used;  // rows in use: count, in whole strips
        const Room at;
        const Operand *keys_t, *keys, *values_t;
        float *dk, *dv;
        float inner[ROWS] = {}, lse[ROWS];

        Block(const AttentionHead& h, int64_t row, int64_t count, const Operand* packs, float* dk, float* dv, char* room)
            : h(h), row(row), count(count), wide(Base::padded(h.width)), used((count + STRIP - 1) / STRIP * STRIP),
              at(room, wide), keys_t(packs), keys(packs + tiles(h.length) * TILE * wide),
              values_t(packs + 2 * tiles(h.length) * TILE * wide), dk(dk), dv(dv) {
            Base::read_rows(h.q, h.dtype, row, count, h.width, used, at.q);
            Base::read_rows(h.grad, h.dtype, row, count, h.width, used, at.grad);
            Math::transpose(at.q, used, wide, at.q_columns);
            Math::transpose(at.grad, used, wide, at.grad_columns);
            for (int64_t i = 0; i < count; ++i) inner[i] = row_product(row + i);
            std::copy(h.lse + row, h.lse + row + count, lse);
            std::fill(lse + count, lse + ROWS, -UNSEEN);  // so that what is beyond the queries counts nothing
            std::memset(at.dq, 0, size_t(used * wide) * sizeof(float));
        }

        float row_product(int64_t t) const {
            const char* grad = static_cast<const char*>(h.grad.data) + t * h.grad.row_bytes;
            const char* out = static_cast<const char*>(h.o.data) + t * h.o.row_bytes;
            return with_dtype(h.dtype, [&](auto dtype) {
                return lane_sum(h.width, [&](int64_t d) { return load_as<dtype>(grad, d) * load_as<dtype>(out, d); });
            });
        }

        // Strips are counted through all tiles. Beside the gradients of one stand the scores of the next, dQ of the one
        // before, and a share of dV and dK of the tile before.
        void run() {
            const int64_t strips = used / STRIP, begin = Base::first_tile(h, row, count) * strips;
            const int64_t end = tiles(row + count) * strips, share = (2 * sum_units() + strips - 1) / strips;
            for (int64_t unit = 0; unit < score_units(); ++unit) score(begin, unit);
            for (int64_t strip = begin; strip < end; ++strip) {
                const int64_t scores = strip + 1 < end && !precedes(strip + 1) ? score_units() : 0;
                const int64_t dqs = strip > begin && !precedes(strip - 1) ? Base::parts(wide) : 0;
                const int64_t done = strip % strips * share, left = std::max<int64_t>(0, 2 * sum_units() - done);
                const int64_t sums = strip < begin + strips ? 0 : std::min(share, left);
                const bool seen = !precedes(strip) && mask(strip);
                if (precedes(strip)) clear(strip);
                const int64_t pairs = precedes(strip) ? 0 : STRIP / 2;
                alternate(pairs, [&](int64_t pair) { gradients(strip, 2 * pair, seen); }, scores + dqs + sums,
                          [&](int64_t unit) {
                              if (unit < scores) return score(strip + 1, unit);
                              if (unit < scores + dqs) return add_dq(strip - 1, unit - scores);
                              add_sums(strip / strips - 1, done + unit - scores - dqs);
                          });
            }
            if (!precedes(end - 1))
                for (int64_t part = 0; part < Base::parts(wide); ++part) add_dq(end - 1, part);
            for (int64_t unit = 0; unit < 2 * sum_units(); ++unit) add_sums(end / strips - 1, unit);
            Base::write_rows(at.dq, wide, h.dq, h.dtype, row, count, h.width);
        }

        int64_t tile_of(int64_t strip) const { return strip / (used / STRIP); }
        int64_t start_of(int64_t strip) const { return strip % (used / STRIP) * STRIP; }

        // Whether the strip's queries come before all keys of its tile.
        bool precedes(int64_t strip) const { return row + start_of(strip) + STRIP <= tile_of(strip) * TILE; }

        void clear(int64_t strip) const {
            const int64_t tile = tile_of(strip) % 2, start = start_of(strip) * TILE;
            for (Operand* place : {at.p[tile], at.ds[tile], at.ds_packed[tile]})
                std::memset(place + start, 0, size_t(STRIP * TILE) * sizeof(Operand));
        }

        static int64_t score_units() { return 2 * Base::parts(TILE); }

        // S, then dP.
        void score(int64_t strip, int64_t unit) const {
            const int64_t from = start_of(strip) * wide, key = tile_of(strip) * TILE * wide, part = unit / 2;
            if (unit % 2 == 0)
                Math::product(at.q + from, STRIP, wide, keys_t + key, TILE, part, at.s[strip % 2], false);
            else
                Math::product(at.grad + from, STRIP, wide, values_t + key, TILE, part, at.dp[strip % 2], false);
        }

        // Whether every key of the strip is seen; otherwise scores are masked, and scaled already.
        bool mask(int64_t strip) const {
            const int64_t start = start_of(strip), key = tile_of(strip) * TILE;
            const int64_t here = std::clamp<int64_t>(count - start, 0, STRIP);
            if (Base::all_seen(h, row + start, here, key)) return true;
            Base::scale_and_mask(h, row + start, here, key, at.s[strip % 2]);
            return false;
        }

        // P and dS of two rows.
        void gradients(int64_t strip, int64_t i, bool seen) const {
            const int64_t tile = tile_of(strip) % 2, line = start_of(strip) + i;
            Math::gradients(at.s[strip % 2] + i * TILE, seen ? h.scale : 1.0f, at.dp[strip % 2] + i * TILE, lse + line,
                            inner + line, h.scale, at.p[tile] + line * TILE, at.ds[tile] + line * TILE,
                            at.ds_packed[tile] + line * TILE);
        }

        void add_dq(int64_t strip, int64_t part) const {
            const int64_t tile = tile_of(strip), start = start_of(strip);
            Math::product(at.ds[tile % 2] + start * TILE, STRIP, TILE, keys + tile * TILE * wide, wide, part,
                          at.dq + start * wide, true);
        }

        // Of dV, and as many of dK: 32 rows by a part of the columns.
        int64_t sum_units() const { return (wide + 31) / 32 * Base::parts(TILE); }

        void add_sums(int64_t tile, int64_t unit) const {
            const bool values = unit < sum_units();
            const int64_t own = values ? unit : unit - sum_units(), d = own / Base::parts(TILE) * 32;
            Math::product((values ? at.grad_columns : at.q_columns) + d * used, std::min<int64_t>(32, wide - d), used,
                          values ? at.p[tile % 2] : at.ds_packed[tile % 2], TILE, own % Base::parts(TILE),
                          (values ? dv : dk) + (tile * TILE * wide + d * TILE), true);
        }
    };
};

}  // namespace
