// The forward pass of attention (attention.h).
#pragma once

#include "attention_tiles.h"

namespace {

template <class Math>
struct AttentionForward {
    using Base = AttentionTiles<Math>;
    using Operand = typename Math::Operand;
    // Queries that are taken together, and rows of scores that are made and used at a time.
    static constexpr int64_t QUERIES = Math::FORWARD_QUERIES, STRIP = QUERIES / 2;

    // Scratch of one thread; of scores and probabilities those of a strip and of its neighbour.
    struct Room {
        Operand *q, *p[2];  // [QUERIES, wide], [STRIP, TILE]
        float *s[2], *acc;  // [STRIP, TILE], [QUERIES, wide]

        Room(const char* room, int64_t wide) {
            Cutter cutter(room);
            // `pack` reads a tile of keys into q's place.
            q = cutter.take<Operand>(TILE * wide);
            for (auto& place : p) place = cutter.take<Operand>(STRIP * TILE);
            for (auto& place : s) place = cutter.take<float>(STRIP * TILE);
            acc = cutter.take<float>(QUERIES * wide);
            end = cutter.end();
        }

        int64_t end;
    };

    static int64_t room_bytes(int64_t width) { return Room(nullptr, Base::padded(width)).end; }

    // Packs K^T (for S) and V (for O) of one key-value head: per tile of keys, wide x TILE and TILE x wide.
    static void pack(const AttentionHead& h, Operand* keys, Operand* values, char* room) {
        const int64_t wide = Base::padded(h.width);
        Operand* rows = Room(room, wide).q;
        for (int64_t row = 0; row < h.length; row += TILE, keys += TILE * wide, values += TILE * wide) {
            const int64_t count = std::min(TILE, h.length - row);
            Base::read_rows(h.k, h.dtype, row, count, h.width, TILE, rows);
            Math::pack_transposed(rows, wide, keys);
            Base::read_rows(h.v, h.dtype, row, count, h.width, TILE, rows);
            Math::pack(rows, wide, values);
        }
    }

    // QUERIES queries of one head; `keys` and `values` as `pack` leaves them.
    static void queries(const AttentionHead& h, int64_t row, const Operand* keys, const Operand* values, char* room) {
        [[maybe_unused]] const typename Math::Scope scope;
        const int64_t wide = Base::padded(h.width), count = std::min(QUERIES, h.length - row);
        const Room at(room, wide);
        float top[QUERIES], sum[QUERIES];
        std::fill(top, top + QUERIES, UNSEEN);
        std::fill(sum, sum + QUERIES, 0.0f);
        std::memset(at.acc, 0, size_t(QUERIES * wide) * sizeof(float));
        Base::read_rows(h.q, h.dtype, row, count, h.width, QUERIES, at.q);
        // Strip after strip: its scores, then their exponentials, then what they weigh of the values. Beside the
        // exponentials of one stand the scores of the next and the values of the one before.
        const int64_t begin = 2 * Base::first_tile(h, row, count), end = 2 * ((row + count + TILE - 1) / TILE);
        const int64_t score_parts = Base::parts(TILE), value_parts = Base::parts(wide);
        const auto score = [&](int64_t strip, int64_t part) {
            Math::product(at.q + strip % 2 * STRIP * wide, STRIP, wide, keys + strip / 2 * TILE * wide, TILE, part,
                          at.s[strip % 2], false);
        };
        const auto weigh = [&](int64_t strip, int64_t part) {
            Math::product(at.p[strip % 2], STRIP, TILE, values + strip / 2 * TILE * wide, wide, part,
                          at.acc + strip % 2 * STRIP * wide, true);
        };
        for (int64_t part = 0; part < score_parts; ++part) score(begin, part);
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t start = strip % 2 * STRIP, key = strip / 2 * TILE;
            const int64_t here = std::clamp<int64_t>(count - start, 0, STRIP);
            const bool seen = Base::all_seen(h, row, count, key);
            const float scale = seen ? h.scale : 1.0f;
            float *s = at.s[strip % 2], *acc = at.acc + start * wide, *tops = top + start, *sums = sum + start;
            float highest[STRIP], fade[STRIP];
            Operand* p = at.p[strip % 2];
            if (!seen) Base::scale_and_mask(h, row + start, here, key, s);
            for (int64_t i = 0; i < here; ++i) highest[i] = std::max(tops[i], Math::highest(s + i * TILE) * scale);
            for (int64_t i = 0; i < here; ++i) fade[i] = exponential(tops[i] - highest[i]);
            std::memset(p + here * TILE, 0, size_t((STRIP - here) * TILE) * sizeof(Operand));
            const int64_t scores = strip + 1 < end ? score_parts : 0, weights = strip > begin ? value_parts : 0;
            const auto soften = [&](int64_t i) {
                if (highest[i] > tops[i])
                    for (int64_t d = 0; d < wide; ++d) acc[i * wide + d] *= fade[i];
                sums[i] = sums[i] * fade[i] + Math::exponentials(s + i * TILE, scale, highest[i], p + i * TILE);
            };
            alternate(here, soften, scores + weights, [&](int64_t unit) {
                unit < scores ? score(strip + 1, unit) : weigh(strip - 1, unit - scores);
            });
            std::copy(highest, highest + here, tops);
        }
        for (int64_t part = 0; part < value_parts; ++part) weigh(end - 1, part);
        for (int64_t i = 0; i < count; ++i) {
            const float share = 1.0f / sum[i];
            for (int64_t d = 0; d < h.width; ++d) at.acc[i * wide + d] *= share;
            h.lse[row + i] = top[i] + std::log(sum[i]);
        }
        Base::write_rows(at.acc, wide, h.o, h.dtype, row, count, h.width);
    }
};

}  // namespace
