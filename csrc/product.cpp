// The many-row product on packed weights with an adapter, and its gradients, blocked as a matrix product is (Goto
// and van de Geijn, ACM TOMS 34-3, 2008): a panel of weights is restored into the cache in the order in which it is
// multiplied, meets every row of x, and is forgotten. The restored matrix never exists, nor do dropped inputs and
// the adapter's own result: its product is a few more words of depth.
#include <atomic>

#include "fourbit.h"
#include "panels.h"
#include "scales.h"

namespace {

// Rows of x that meet a restored panel: so many that restoring takes little of the time where several threads
// share the rows, and so few that a thread has room for them.
constexpr int64_t ENOUGH_ROWS = 256, MOST_ROWS = 1008, TILES_BYTES = 4 << 20;

// Of the calling thread, read by all.
thread_local Room scales_room, down_room, low_room, bits_room;
// Of each thread.
thread_local Room tiles_room, panel_room, lines_room, sums_room, more_room, rows_room;

// Which rows of which call a thread's tiles hold.
struct Packed {
    int64_t call, first;
};
std::atomic<int64_t> next_call{1};
thread_local Packed packed{0, 0};

struct Call {
    const FbProduct& p;
    const ProductKernels& k;
    Weight weight;
    int threads;
    int64_t number = next_call.fetch_add(1, std::memory_order_relaxed);
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
    int64_t low_words() const { return words_of(p.rank, p.dtype); }
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

void restore_scales(Call& c) {
    const FbProduct& p = c.p;
    c.weight.absmax = static_cast<const float*>(p.absmax);
    if (!p.nested_absmax) return;
    const int64_t blocks = ceil_div(p.out_features * p.in_features, p.block_size);
    float* room = scales_room.at_least<float>(blocks);
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
uint32_t* pack_down(Call& c, bool gradient) {
    const FbProduct& p = c.p;
    const int64_t depth = gradient ? p.out_features : p.in_features, words = words_of(depth, p.dtype);
    const int64_t step = panel_words(words, p.dtype), parts = ceil_div(words, step), per = per_word(p.dtype);
    uint32_t* panels = down_room.at_least<uint32_t>(c.rank_panels() * words * c.k.lanes);
    if (!c.has(panels)) return nullptr;
    parallel_for(c.rank_panels() * parts, c.threads, [&](int64_t task) {
        const int64_t first = task / parts * c.k.lanes, start = task % parts * step;
        const int64_t count = std::min(step, words - start), real = std::min(c.k.lanes, p.rank - first);
        const int64_t from = start * per, values = std::min(count * per, depth - from);
        uint32_t* panel = panels + (task / parts * words + start) * c.k.lanes;
        char* lines = lines_room.at_least<char>(LINES_BYTES);
        if (!c.has(lines)) return;
        const int64_t bytes = dtype_bytes(p.dtype);
        if (!gradient) {
            for (int64_t lane = 0; lane < real; ++lane) {
                char* line = lines + lane * LINE_STRIDE;
                narrow(c.k, p.a + (first + lane) * depth + from, values, 1.0f, bytes, line);
                std::memset(line + values * bytes, 0, size_t(4 * count - values * bytes));
            }
            c.k.transpose(lines, LINE_STRIDE, real, count, panel, c.k.lanes);
            return;
        }
        for (int64_t i = 0; i < values; i += per) {
            const bool second = per == 2 && i + 1 < values;
            const float* row = p.b + (from + i) * p.rank + first;
            narrow(c.k, row, real, 1.0f, bytes, lines);
            if (second) narrow(c.k, row + p.rank, real, 1.0f, bytes, lines + LINE_STRIDE);
            c.k.interleave(lines, second ? lines + LINE_STRIDE : nullptr, ~0u, ~0u, real,
                           panel + i / per * c.k.lanes);
        }
    });
    return panels;
}

// out [M,r] = rows times the panels of `pack_down` times scale, a tile of rows at a time; `fill(first, real)` gives
// the tile's rows.
template <class Fill>
void multiply_down(Call& c, const uint32_t* panels, int64_t depth, float scale, void* out, const Fill& fill) {
    const FbProduct& p = c.p;
    const int64_t words = words_of(depth, p.dtype), step = panel_words(words, p.dtype);
    parallel_for(ceil_div(p.rows, c.k.rows), c.threads, [&](int64_t task) {
        const int64_t first = task * c.k.rows, real = std::min(c.k.rows, p.rows - first);
        uint32_t* tile = rows_room.at_least<uint32_t>(words * c.k.rows);
        if (!c.has(tile)) return;
        const Rows rows = fill(first, real);
        if (!rows.data) return;
        pack_tile(c.k, rows, 0, real, c.k.height(real), tile);
        float sums[MOST_HEIGHT * MOST_LANES], none[MOST_LANES] = {};
        for (int64_t panel = 0; panel < c.rank_panels(); ++panel) {
            const int64_t lane = panel * c.k.lanes, width = std::min(c.k.lanes, p.rank - lane);
            for (int64_t start = 0; start < words; start += step)
                multiply_tiles(c.k, tile, real, words, start, std::min(step, words - start),
                               panels + (panel * words + start) * c.k.lanes, start > 0, sums);
            for (int64_t r = 0; r < real; ++r) {
                float* row = sums + r * c.k.lanes;
                for (int64_t i = 0; i < width; ++i) row[i] *= scale;
                c.k.store(row, none, width,
                          static_cast<char*>(out) + ((first + r) * p.rank + lane) * dtype_bytes(p.dtype));
            }
        }
    });
}

void pack_tiles(const ProductKernels& k, const Rows& rows, int64_t first, int64_t count, uint32_t* tiles) {
    const int64_t words = words_of(rows.depth, rows.dtype);
    for (int64_t row = 0; row < count; row += k.rows) {
        const int64_t real = std::min(k.rows, count - row);
        pack_tile(k, rows, first + row, real, k.height(real), tiles + row * words);
    }
}

// Tasks of row groups times panels. Each thread packs the rows that it multiplies: what another core has just
// written is slow to read. work(first row, rows, their tiles, the tiles of the same rows of low, panel).
template <class Work>
void for_panels(Call& c, const Rows& left, const void* low, int64_t width, const Work& work) {
    const int64_t words = words_of(left.depth, left.dtype), panels = ceil_div(width, c.k.lanes);
    const int64_t fitting = std::min(MOST_ROWS, std::max(c.k.rows, TILES_BYTES / (4 * words)));
    const int64_t groups = std::max(ceil_div(c.p.rows, fitting), std::min<int64_t>(c.threads, c.p.rows / ENOUGH_ROWS));
    const int64_t each = ceil_div(ceil_div(c.p.rows, std::max<int64_t>(1, groups)), c.k.rows) * c.k.rows;
    parallel_for(ceil_div(c.p.rows, each) * panels, c.threads, [&](int64_t task) {
        const int64_t first = task / panels * each, rows = std::min(each, c.p.rows - first);
        const int64_t all_rows = ceil_div(rows, c.k.rows) * c.k.rows;
        uint32_t* tiles = tiles_room.at_least<uint32_t>(all_rows * (words + c.low_words()));
        uint32_t* low_tiles = tiles + all_rows * words;
        const bool room = c.has(tiles) && c.has(panel_room.at_least<uint32_t>(MOST_WORDS * MOST_LANES)) &&
                          c.has(lines_room.at_least<char>(LINES_BYTES)) &&
                          c.has(sums_room.at_least<float>((rows + c.k.rows) * c.k.lanes));
        if (!room) return;
        if (packed.call != c.number || packed.first != first) {
            pack_tiles(c.k, left, first, rows, tiles);
            if (c.p.rank) pack_tiles(c.k, Rows{low, c.p.rank, c.p.dtype}, first, rows, low_tiles);
            packed = {c.number, first};
        }
        work(first, rows, tiles, low_tiles, task % panels);
    });
}

// sums of rows of `tiles`, `depth` deep, times a panel made piece by piece by make(start, count, panel).
template <class Make>
float* multiply_panel(Call& c, const uint32_t* tiles, int64_t rows, int64_t depth, const Make& make) {
    const int64_t words = words_of(depth, c.p.dtype), step = panel_words(words, c.p.dtype);
    uint32_t* panel = panel_room.at_least<uint32_t>(MOST_WORDS * MOST_LANES);
    float* sums = sums_room.at_least<float>((rows + c.k.rows) * c.k.lanes);
    for (int64_t start = 0; start < words; start += step) {
        const int64_t count = std::min(step, words - start);
        make(start, count, panel);
        multiply_tiles(c.k, tiles, rows, words, start, count, panel, start > 0, sums);
    }
    return sums;
}

// Rows first .. of scaling B, or columns first .. of A, as a panel [low words][lanes].
const uint32_t* up_panel(Call& c, int64_t first, bool gradient) {
    const FbProduct& p = c.p;
    const int64_t words = c.low_words(), per = per_word(p.dtype), bytes = dtype_bytes(p.dtype);
    const int64_t width = std::min(c.k.lanes, (gradient ? p.in_features : p.out_features) - first);
    const int64_t stride = std::max(4 * words, 4 * c.k.lanes);
    uint32_t* panel = more_room.at_least<uint32_t>(words * c.k.lanes + MOST_LANES * stride / 4);
    if (!c.has(panel)) return nullptr;
    char* lines = reinterpret_cast<char*>(panel + words * c.k.lanes);
    if (!gradient) {
        for (int64_t lane = 0; lane < width; ++lane) {
            char* line = lines + lane * stride;
            std::memset(line + 4 * (words - 1), 0, 4);
            narrow(c.k, p.b + (first + lane) * p.rank, p.rank, p.scaling, bytes, line);
        }
        c.k.transpose(lines, stride, width, words, panel, c.k.lanes);
        return panel;
    }
    for (int64_t i = 0; i < p.rank; i += per) {
        const bool second = per == 2 && i + 1 < p.rank;
        const float* row = p.a + i * p.in_features + first;
        narrow(c.k, row, width, 1.0f, bytes, lines);
        if (second) narrow(c.k, row + p.in_features, width, 1.0f, bytes, lines + stride);
        c.k.interleave(lines, second ? lines + stride : nullptr, ~0u, ~0u, width, panel + i / per * c.k.lanes);
    }
    return panel;
}

// y += what the adapter adds, for rows that were multiplied with the packed codes themselves.
void add_adapter(Call& c) {
    const FbProduct& p = c.p;
    const int64_t words = c.low_words();
    parallel_for(ceil_div(p.out_features, c.k.lanes), c.threads, [&](int64_t task) {
        const int64_t lane = task * c.k.lanes, width = std::min(c.k.lanes, p.out_features - lane);
        const uint32_t* panel = up_panel(c, lane, false);
        uint32_t* tile = tiles_room.at_least<uint32_t>(words * c.k.rows);
        packed = {0, 0};
        if (!panel || !c.has(tile)) return;
        for (int64_t row = 0; row < p.rows; row += c.k.rows) {
            const int64_t real = std::min(c.k.rows, p.rows - row);
            float sums[MOST_HEIGHT * MOST_LANES], before[MOST_LANES] = {};
            pack_tile(c.k, Rows{p.low, p.rank, p.dtype}, row, real, c.k.height(real), tile);
            multiply_tiles(c.k, tile, real, words, 0, words, panel, false, sums);
            for (int64_t r = 0; r < real; ++r) {
                char* y = static_cast<char*>(p.y) + ((row + r) * p.out_features + lane) * dtype_bytes(p.dtype);
                for (int64_t i = 0; i < width; ++i) before[i] = load_value(y, p.dtype, i);
                c.k.store(sums + r * c.k.lanes, before, width, y);
            }
        }
    });
}

void forward(Call& c) {
    const FbProduct& p = c.p;
    const Rows x{p.x, p.in_features, p.dtype};
    if (p.rank) {
        const uint32_t* panels = pack_down(c, false);
        if (!panels) return;
        multiply_down(c, panels, p.in_features, 1.0f, p.low, [&](int64_t first, int64_t real) {
            if (!c.drops()) return Rows{x.row(first), x.depth, x.dtype};
            char* dropped = sums_room.at_least<char>(c.k.rows * x.bytes());
            if (!c.has(dropped)) return Rows{nullptr, 0, 0};
            for (int64_t r = 0; r < real; ++r)
                kernels().dropout(c.dropout_row(first + r, dropped + r * x.bytes()));
            return Rows{dropped, x.depth, x.dtype};
        });
    }
    if (p.few) {
        fb_linear_4bit(p.x, p.dtype, p.rows, p.in_features, p.out_features, p.codes, p.absmax, p.nested_absmax,
                       p.offset, p.map, p.block_size, p.codebook, p.bias, p.y, c.threads);
        if (p.rank) add_adapter(c);
        return;
    }
    restore_scales(c);
    if (!c.enough.load(std::memory_order_relaxed)) return;
    for_panels(c, x, p.low, p.out_features, [&](int64_t first, int64_t rows, const uint32_t* tiles,
                                               const uint32_t* low_tiles, int64_t panel) {
        const int64_t lane = panel * c.k.lanes, width = std::min(c.k.lanes, p.out_features - lane);
        char* lines = lines_room.at_least<char>(LINES_BYTES);
        float* sums = multiply_panel(c, tiles, rows, p.in_features, [&](int64_t start, int64_t count, uint32_t* to) {
            c.weight.rows_panel(c.k, lane, start, count, lines, to);
        });
        const uint32_t* up = p.rank ? up_panel(c, lane, false) : nullptr;
        if (up) multiply_tiles(c.k, low_tiles, rows, c.low_words(), 0, c.low_words(), up, true, sums);
        float bias[MOST_LANES] = {};
        for (int64_t i = 0; p.bias && i < width; ++i) bias[i] = load_value(p.bias, p.dtype, lane + i);
        char* y = static_cast<char*>(p.y);
        for (int64_t row = 0; row < rows; ++row)
            c.k.store(sums + row * c.k.lanes, bias, width,
                      y + ((first + row) * p.out_features + lane) * dtype_bytes(p.dtype));
    });
}

// Which values of x dropout keeps, [M, mask words].
const uint32_t* kept_bits(Call& c) {
    uint32_t* bits = bits_room.at_least<uint32_t>(c.p.rows * c.mask_words());
    if (!c.has(bits)) return nullptr;
    parallel_for(c.p.rows, c.threads,
                 [&](int64_t m) { c.k.kept(c.dropout_row(m, nullptr), bits + m * c.mask_words()); });
    return bits;
}

// grad_low [M,r] = scaling grad B.
const void* gradient_of_low(Call& c, const Rows& grad) {
    const uint32_t* panels = pack_down(c, true);
    char* low = low_room.at_least<char>(c.p.rows * c.p.rank * dtype_bytes(c.p.dtype));
    if (!panels || !c.has(low)) return nullptr;
    multiply_down(c, panels, c.p.out_features, c.p.scaling, low,
                  [&](int64_t first, int64_t) { return Rows{grad.row(first), grad.depth, grad.dtype}; });
    return low;
}

void gradient_of_x(Call& c, const Rows& grad, const void* grad_low, const uint32_t* bits, float kept_scale) {
    const FbProduct& p = c.p;
    const int64_t low_words = c.low_words();
    for_panels(c, grad, grad_low, p.in_features, [&](int64_t first, int64_t rows, const uint32_t* tiles,
                                                     const uint32_t* low_tiles, int64_t panel) {
        const int64_t lane = panel * c.k.lanes, width = std::min(c.k.lanes, p.in_features - lane);
        float* sums = multiply_panel(c, tiles, rows, p.out_features, [&](int64_t start, int64_t count, uint32_t* to) {
            c.weight.columns_panel(c.k, lane, start, count, to);
        });
        if (const uint32_t* up = p.rank ? up_panel(c, lane, true) : nullptr) {
            if (!bits) {
                multiply_tiles(c.k, low_tiles, rows, low_words, 0, low_words, up, true, sums);
            } else {
                float more[MOST_HEIGHT * MOST_LANES];
                for (int64_t row = 0; row < rows; row += c.k.rows) {
                    const int64_t real = std::min(c.k.rows, rows - row);
                    multiply_tiles(c.k, low_tiles + row * low_words, real, low_words, 0, low_words, up, false, more);
                    for (int64_t r = 0; r < real; ++r) {
                        const uint32_t* mask = bits + (first + row + r) * c.mask_words();
                        c.k.add_kept(more + r * c.k.lanes, mask[lane / 32] >> (lane % 32), kept_scale,
                                     sums + (row + r) * c.k.lanes);
                    }
                }
            }
        }
        const float none[MOST_LANES] = {};
        char* out = static_cast<char*>(p.grad_x);
        for (int64_t row = 0; row < rows; ++row)
            c.k.store(sums + row * c.k.lanes, none, width,
                      out + ((first + row) * p.in_features + lane) * dtype_bytes(p.dtype));
    });
}

// [r, columns] = low^T times `right` [M, columns], times scale: as it is, or transposed.
void gradient_of_adapter(Call& c, const void* low, const Rows& right, const uint32_t* bits, float scale,
                         bool transposed, float* out) {
    const FbProduct& p = c.p;
    const int64_t words = words_of(p.rows, p.dtype), step = panel_words(words, p.dtype), per = per_word(p.dtype);
    const int64_t tiles_of_rank = ceil_div(p.rank, c.k.rows);
    // low^T in tiles, each [words][height].
    uint32_t* tiles = down_room.at_least<uint32_t>(tiles_of_rank * c.k.rows * words);
    if (!c.has(tiles)) return;
    parallel_for(tiles_of_rank, c.threads, [&](int64_t tile) {
        const int64_t first = tile * c.k.rows, real = std::min(c.k.rows, p.rank - first), height = c.k.height(real);
        uint32_t* to = tiles + first * words;
        std::memset(to, 0, size_t(4 * height * words));
        for (int64_t m = 0; m < p.rows; ++m)
            for (int64_t r = 0; r < real; ++r)
                std::memcpy(reinterpret_cast<char*>(to + m / per * height + r) + m % per * dtype_bytes(p.dtype),
                            static_cast<const char*>(low) + (m * p.rank + first + r) * dtype_bytes(p.dtype),
                            size_t(dtype_bytes(p.dtype)));
    });
    parallel_for(ceil_div(right.depth, c.k.lanes), c.threads, [&](int64_t task) {
        const int64_t lane = task * c.k.lanes, width = std::min(c.k.lanes, right.depth - lane);
        uint32_t* panel = panel_room.at_least<uint32_t>(MOST_WORDS * MOST_LANES);
        float* sums = sums_room.at_least<float>((p.rank + c.k.rows) * c.k.lanes);
        if (!c.has(panel) || !c.has(sums)) return;
        for (int64_t start = 0; start < words; start += step) {
            const int64_t count = std::min(step, words - start);
            pack_columns(c.k, right, lane, start * per, std::min(count * per, p.rows - start * per), bits,
                         c.mask_words(), panel);
            multiply_tiles(c.k, tiles, p.rank, words, start, count, panel, start > 0, sums);
        }
        for (int64_t r = 0; r < p.rank; ++r)
            for (int64_t i = 0; i < width; ++i)
                out[transposed ? (lane + i) * p.rank + r : r * right.depth + lane + i] =
                    sums[r * c.k.lanes + i] * scale;
    });
}

void backward(Call& c) {
    const FbProduct& p = c.p;
    const Rows grad{p.grad, p.out_features, p.dtype}, x{p.x, p.in_features, p.dtype};
    const void* grad_low = p.rank ? gradient_of_low(c, grad) : nullptr;
    const uint32_t* bits = c.drops() ? kept_bits(c) : nullptr;
    if (!c.enough.load(std::memory_order_relaxed)) return;
    const float kept_scale = c.drops() ? c.dropout_row(0, nullptr).scale : 1.0f;
    if (p.grad_x) restore_scales(c);
    if (!c.enough.load(std::memory_order_relaxed)) return;
    if (p.grad_x) gradient_of_x(c, grad, grad_low, bits, kept_scale);
    if (p.rank && p.grad_a) {
        gradient_of_adapter(c, grad_low, x, bits, kept_scale, false, p.grad_a);
        gradient_of_adapter(c, p.low, grad, nullptr, p.scaling, true, p.grad_b);
    }
}

const ProductKernels* kernels_for(int dtype) {
    return dtype == BF16 ? kernels().product : dtype == FP32 ? kernels().product_wide : nullptr;
}

int run(const FbProduct& p, int threads, void (*work)(Call&)) {
    const ProductKernels* kernels = kernels_for(p.dtype);
    if (!kernels || p.rows <= 0 || p.in_features <= 0 || p.out_features <= 0 || p.rank < 0) return 1;
    if (!valid_block_size(p.block_size) || !(p.p >= 0.0 && p.p * 65536.0 + 0.5 < 65536.0)) return 1;
    Call call(p, *kernels, threads);
    work(call);
    return call.enough.load(std::memory_order_relaxed) ? 0 : 2;
}

}  // namespace

int fb_has_product(int dtype) { return kernels_for(dtype) != nullptr; }

int fb_product(const FbProduct* problem, int threads) { return run(*problem, threads, forward); }

int fb_product_grad(const FbProduct* problem, int threads) { return run(*problem, threads, backward); }
