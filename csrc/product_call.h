// What the many-row product and its gradients share: one call, and how its operands are laid out and multiplied.
#pragma once

#include <atomic>

#include "fourbit.h"
#include "panels.h"
#include "scales.h"

// Scratch of a thread.
struct ProductRooms {
    Room scales, down, low, bits;                  // of the calling thread, read by all
    Room tiles, panel, lines, sums, more, rows;    // of each thread
    int64_t call = 0, first = 0;                   // which rows of which call are in `tiles`
};
ProductRooms& product_rooms();
int64_t next_product_call();
// Of the instruction set in use; null where it leaves the dtype to others.
const ProductKernels* product_kernels(int dtype);

namespace {

// Rows of x that meet a restored panel: so many that restoring takes little of the time where several threads
// share the rows, and so few that a thread has room for them.
constexpr int64_t ENOUGH_ROWS = 256, MOST_ROWS = 1008;
// Where fewer rows fit the cache, tiles come from the last one: so many bytes of them, so many tiles at a time, which
// meet some panels before they are forgotten.
constexpr int64_t STREAMED_BYTES = 8 << 20, STREAMED_TILES = 4;

// A result of so many bytes is gone from the caches before anyone reads it.
constexpr int64_t STREAMED_RESULT = 1 << 20;

inline ProductRooms& rooms() { return product_rooms(); }

struct Call {
    const FbProduct& p;
    const ProductKernels& k;
    Weight weight;
    int threads;
    int64_t number = next_product_call();
    std::atomic<bool> enough{true};  // memory

    Call(const FbProduct& problem, const ProductKernels& kernels, int count)
        : p(problem), k(kernels),
          weight{p.out_features, p.in_features, p.codes, nullptr, p.block_size, p.codebook, p.dtype},
          threads(count) {}

    bool has(const void* room) {
        if (!room) enough.store(false, std::memory_order_relaxed);
        return room != nullptr;
    }
    bool drops() const { return p.rank > 0 && p.p > 0; }
    int64_t low_words() const { return words_of(k, p.rank, p.dtype); }
    int64_t rank_panels() const { return ceil_div(p.rank, k.lanes); }
    int64_t mask_words() const { return ceil_div(p.in_features, 32); }

    DropoutRow dropout_row(int64_t m, void* y) const {
        const uint32_t threshold = uint32_t(p.p * 65536.0 + 0.5);
        const uint32_t key = uint32_t(uint64_t(p.seed)) ^ uint32_t(uint64_t(p.seed) >> 32);
        const Rows rows{p.x, p.in_features, p.dtype};
        return {p.x ? rows.row(m) : nullptr,
                y,
                p.dtype,
                p.in_features,
                uint32_t(p.row[m]),
                uint32_t(p.position[m]),
                uint32_t(p.layer),
                {key, uint32_t(p.step)},
                threshold,
                65536.0f / float(65536 - threshold)};
    }
};

inline void restore_scales(Call& c) {
    const FbProduct& p = c.p;
    c.weight.absmax = static_cast<const float*>(p.absmax);
    if (!p.nested_absmax) return;
    const int64_t blocks = ceil_div(p.out_features * p.in_features, p.block_size);
    float* room = rooms().scales.at_least<float>(blocks);
    if (!c.has(room)) return;
    const Scales scales{p.absmax, p.nested_absmax, p.offset, p.map};
    parallel_for(ceil_div(blocks, NESTED_BLOCK_SIZE), c.threads, [&](int64_t part) {
        const int64_t first = part * NESTED_BLOCK_SIZE;
        scales.run(first, std::min(NESTED_BLOCK_SIZE, blocks - first), room + first);
    });
    c.weight.absmax = room;
}

// The small matrix that multiplies from the right, as panels [rank panels][words][lanes]: A for x, B for the
// gradient of y. Its lanes are the adapter's dimensions, zero beyond the last.
inline uint32_t* pack_down(Call& c, bool gradient) {
    const FbProduct& p = c.p;
    const int64_t depth = gradient ? p.out_features : p.in_features, words = words_of(c.k, depth, p.dtype);
    const int64_t step = panel_words(words, p.dtype), parts = ceil_div(words, step), per = per_word(p.dtype);
    uint32_t* panels = rooms().down.at_least<uint32_t>(c.rank_panels() * words * c.k.lanes);
    if (!c.has(panels)) return nullptr;
    parallel_for(c.rank_panels() * parts, c.threads, [&](int64_t task) {
        const int64_t first = task / parts * c.k.lanes, start = task % parts * step;
        const int64_t count = std::min(step, words - start), real = std::min(c.k.lanes, p.rank - first);
        const int64_t from = start * per, values = std::min(count * per, depth - from);
        uint32_t* panel = panels + (task / parts * words + start) * c.k.lanes;
        if (gradient) {
            narrow_columns_panel(c.k, p.b + from * p.rank + first, p.rank, values, real, p.dtype, count, panel);
            return;
        }
        char* lines = rooms().lines.at_least<char>(LINES_BYTES);
        if (c.has(lines))
            narrow_rows_panel(c.k, p.a + first * depth + from, depth, real, values, 1.0f, p.dtype, count, lines,
                              LINE_STRIDE, panel);
    });
    return panels;
}

// The adapter's other matrix as a panel [low words][lanes]: rows first .. of scaling B, or columns first .. of A.
inline void up_panel(Call& c, int64_t first, bool gradient, uint32_t* panel) {
    const FbProduct& p = c.p;
    const int64_t words = c.low_words(), width = std::min(c.k.lanes, (gradient ? p.in_features : p.out_features) - first);
    if (gradient) {
        narrow_columns_panel(c.k, p.a + first, p.in_features, p.rank, width, p.dtype, words, panel);
    } else if (char* lines = rooms().more.at_least<char>(4 * words * MOST_LANES); c.has(lines)) {
        narrow_rows_panel(c.k, p.b + first * p.rank, p.rank, width, p.rank, p.scaling, p.dtype, words, lines, 4 * words,
                          panel);
    }
}

// What a tile is multiplied with for low [M,r]: the panels of `pack_down`, and a factor.
struct Down {
    const uint32_t* panels;
    float scale;
    void* low;
};

// out [real,r] = a tile of `real` rows, `depth` of its `words` words deep, times those panels times the factor.
inline void multiply_down(const Call& c, const Down& down, const uint32_t* tile, int64_t real, int64_t words,
                          int64_t depth, char* out) {
    const FbProduct& p = c.p;
    const int64_t deep = words_of(c.k, depth, p.dtype), step = panel_words(deep, p.dtype);
    alignas(64) float sums[MOST_HEIGHT * MOST_LANES];
    const float none[MOST_LANES] = {};
    for (int64_t panel = 0; panel < c.rank_panels(); ++panel) {
        const int64_t lane = panel * c.k.lanes, width = std::min(c.k.lanes, p.rank - lane);
        for (int64_t start = 0; start < deep; start += step)
            c.k.multiply(tile, real, words, start, std::min(step, deep - start),
                         down.panels + (panel * deep + start) * c.k.lanes, start > 0, sums);
        for (int64_t r = 0; r < real; ++r) {
            float* row = sums + r * c.k.lanes;
            for (int64_t i = 0; i < width; ++i) row[i] *= down.scale;
            c.k.store(row, none, width, out + (r * p.rank + lane) * dtype_bytes(p.dtype));
        }
    }
}

// low of all rows, `depth` deep; `fill(first, real)` gives those of a tile.
template <class Fill>
void multiply_down(Call& c, const Down& down, int64_t depth, const Fill& fill) {
    const int64_t words = words_of(c.k, depth, c.p.dtype);
    parallel_for(ceil_div(c.p.rows, c.k.rows), c.threads, [&](int64_t task) {
        const int64_t first = task * c.k.rows, real = std::min(c.k.rows, c.p.rows - first);
        uint32_t* tile = rooms().rows.at_least<uint32_t>(words * c.k.rows);
        if (!c.has(tile)) return;
        const Rows rows = fill(first, real);
        if (!rows.data) return;
        pack_tile(c.k, rows, 0, real, c.k.height(real), tile);
        char* out = static_cast<char*>(down.low) + first * c.p.rank * dtype_bytes(c.p.dtype);
        multiply_down(c, down, tile, real, words, depth, out);
    });
}

// Words of a panel of a piece of depth and of low.
inline int64_t panel_size(const Call& c) { return (MOST_WORDS + c.low_words()) * c.k.lanes; }

// Some rows of the left operand as tiles, whose last words are those of low, and the panels that they meet.
struct Slab {
    int64_t first_row, rows, depth, first_panel, panels;
    const uint32_t* tiles;
    uint32_t* room;  // for a piece of each panel
    float* sums;     // [panels][padded][lanes]
    int64_t padded;  // rows, the last tile filled up
};

// Rows first_row .. of `left` and of low as tiles. `down` makes low, which is written where this is the first slab of
// these rows; without panels it is there.
inline void pack_slab(Call& c, const Rows& left, const Down& down, const Slab& s, int64_t words, uint32_t* tiles) {
    const int64_t deep = words - c.low_words(), bytes = c.p.rank * dtype_bytes(c.p.dtype);
    char* made = rooms().more.at_least<char>(c.k.rows * bytes);
    if (!c.has(made)) return;
    for (int64_t row = 0; row < s.rows; row += c.k.rows, tiles += c.k.rows * words) {
        const int64_t real = std::min(c.k.rows, s.rows - row), height = c.k.height(real);
        pack_tile(c.k, left, s.first_row + row, real, height, tiles);
        if (!c.p.rank) continue;
        char* low = static_cast<char*>(down.low) + (s.first_row + row) * bytes;
        if (down.panels) {
            multiply_down(c, down, tiles, real, words, left.depth, made);
            if (s.first_panel == 0) std::memcpy(low, made, size_t(real * bytes));
            low = made;
        }
        pack_tile(c.k, Rows{low, c.p.rank, c.p.dtype}, 0, real, height, tiles + deep * height);
    }
}

// The result, `width` wide, in slabs. Each thread packs the rows that it multiplies: what another core has just
// written is slow to read.
template <class Work>
void for_slabs(Call& c, const Rows& left, const Down& down, int64_t width, const Work& work) {
    const int64_t words = words_of(c.k, left.depth, left.dtype) + c.low_words();
    const int64_t panels = ceil_div(width, c.k.lanes);
    const bool streamed = c.k.together > 1 && c.k.tiles_bytes / (4 * words) <= ENOUGH_ROWS;
    const int64_t cached = streamed ? STREAMED_BYTES : c.k.tiles_bytes;
    const int64_t fitting = std::min(MOST_ROWS, std::max(c.k.rows, cached / (4 * words)));
    const int64_t groups = std::max(ceil_div(c.p.rows, fitting), std::min<int64_t>(c.threads, c.p.rows / ENOUGH_ROWS));
    const int64_t each = ceil_div(ceil_div(c.p.rows, std::max<int64_t>(1, groups)), c.k.rows) * c.k.rows;
    const int64_t shares = ceil_div(c.p.rows, each);
    const int64_t together =
        streamed ? std::clamp<int64_t>(shares * panels / (2 * c.threads), 1, c.k.together) : 1;
    const int64_t parts = ceil_div(panels, together);
    parallel_for(shares * parts, c.threads, [&](int64_t task) {
        Slab s{};
        s.first_row = task / parts * each, s.rows = std::min(each, c.p.rows - s.first_row), s.depth = left.depth;
        s.first_panel = task % parts * together, s.panels = std::min(together, panels - s.first_panel);
        s.padded = ceil_div(s.rows, c.k.rows) * c.k.rows;
        uint32_t* tiles = rooms().tiles.at_least<uint32_t>(s.padded * words);
        s.tiles = tiles;
        s.room = rooms().panel.at_least<uint32_t>(s.panels * panel_size(c));
        s.sums = rooms().sums.at_least<float>(s.panels * s.padded * c.k.lanes);
        if (!c.has(tiles) || !c.has(s.room) || !c.has(s.sums)) return;
        // The first slab of these rows writes low, though this thread may have come to a later one before.
        const bool writes = down.panels && s.first_panel == 0;
        if (writes || rooms().call != c.number || rooms().first != s.first_row) {
            pack_slab(c, left, down, s, words, tiles);
            rooms().call = c.number, rooms().first = s.first_row;
        }
        work(s);
    });
}

// The slab's sums, of tiles times panels made piece by piece by make(panel, start, count, to). The words of low, by
// those that up(panel, to) makes, are a few more of the last piece; without `lows` they are left out.
template <class Make, class Up>
void multiply_slab(Call& c, const Slab& s, const Make& make, bool lows, const Up& up) {
    const int64_t words = words_of(c.k, s.depth, c.p.dtype), step = panel_words(words, c.p.dtype), low = c.low_words();
    const int64_t some = s.panels == 1 ? s.rows : STREAMED_TILES * c.k.rows, size = panel_size(c);
    for (int64_t start = 0; start < words; start += step) {
        int64_t count = std::min(step, words - start);
        const bool last = lows && start + count == words;
        for (int64_t i = 0; i < s.panels; ++i) {
            make(s.first_panel + i, start, count, s.room + i * size);
            if (last) up(s.first_panel + i, s.room + i * size + count * c.k.lanes);
        }
        if (last) count += low;
        for (int64_t row = 0; row < s.rows; row += some)
            for (int64_t i = 0; i < s.panels; ++i)
                c.k.multiply(s.tiles + row * (words + low), std::min(some, s.rows - row), words + low, start, count,
                             s.room + i * size, start > 0, s.sums + (i * s.padded + row) * c.k.lanes);
    }
}

// Rows of y, `width` wide, from a slab's sums plus bias [width] of the dtype, if any.
inline void store_slab(const Call& c, const Slab& s, const void* bias, int64_t width, void* y) {
    const int64_t bytes = dtype_bytes(c.p.dtype), lanes = c.k.lanes, first = s.first_panel * lanes;
    float added[MOST_TOGETHER * MOST_LANES] = {};
    for (int64_t j = 0; bias && j < std::min(s.panels * lanes, width - first); ++j)
        added[j] = load_value(bias, c.p.dtype, first + j);
    for (int64_t i = 0; i < s.panels; ++i) {
        const float* sums = s.sums + i * s.padded * lanes;
        const int64_t some = std::min(lanes, width - first - i * lanes);
        char* out = static_cast<char*>(y) + (s.first_row * width + first + i * lanes) * bytes;
        if (c.k.stream && c.p.rows * width * bytes >= STREAMED_RESULT) {
            c.k.stream(sums, added + i * lanes, s.rows, some, out, width * bytes);
            continue;
        }
        for (int64_t row = 0; row < s.rows; ++row)
            c.k.store(sums + row * lanes, added + i * lanes, some, out + row * width * bytes);
    }
}

// Checks a problem and does the work; returns what fb_product does.
inline int run_product(const FbProduct& p, int threads, void (*work)(Call&)) {
    const ProductKernels* kernels = product_kernels(p.dtype);
    if (!kernels || p.rows <= 0 || p.in_features <= 0 || p.out_features <= 0 || p.rank < 0) return 1;
    if (!valid_block_size(p.block_size) || !(p.p >= 0.0 && p.p * 65536.0 + 0.5 < 65536.0)) return 1;
    Call call(p, *kernels, threads);
    work(call);
    return call.enough.load(std::memory_order_relaxed) ? 0 : 2;
}

}  // namespace
