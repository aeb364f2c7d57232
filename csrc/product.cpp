// The many-row product on packed weights with an adapter, blocked as a matrix product is (Goto and van de Geijn, ACM
// TOMS 34-3, 2008): a panel of weights is restored into the cache in the order in which it is multiplied, meets every
// row of x, and is forgotten. The restored matrix never exists, nor do dropped inputs and the adapter's own result:
// its product is a few more words of depth.
#include "product_call.h"

ProductRooms& product_rooms() {
    thread_local ProductRooms rooms;
    return rooms;
}

int64_t next_product_call() {
    static std::atomic<int64_t> calls{0};
    return calls.fetch_add(1, std::memory_order_relaxed) + 1;
}

const ProductKernels* product_kernels(int dtype) {
    return dtype == BF16 ? kernels().product : dtype == FP32 ? kernels().product_wide : nullptr;
}

namespace {

// y += what the adapter adds, for rows that were multiplied with the packed codes themselves.
void add_adapter(Call& c) {
    const FbProduct& p = c.p;
    const int64_t words = c.low_words();
    parallel_for(ceil_div(p.out_features, c.k.lanes), c.threads, [&](int64_t task) {
        const int64_t lane = task * c.k.lanes, width = std::min(c.k.lanes, p.out_features - lane);
        uint32_t* panel = rooms().panel.at_least<uint32_t>(words * c.k.lanes);
        uint32_t* tile = rooms().tiles.at_least<uint32_t>(words * c.k.rows);
        rooms().call = 0;
        if (!c.has(panel) || !c.has(tile)) return;
        up_panel(c, lane, false, panel);
        for (int64_t row = 0; row < p.rows; row += c.k.rows) {
            const int64_t real = std::min(c.k.rows, p.rows - row);
            alignas(64) float sums[MOST_HEIGHT * MOST_LANES];
            float before[MOST_LANES] = {};
            pack_tile(c.k, Rows{p.low, p.rank, p.dtype}, row, real, c.k.height(real), tile);
            c.k.multiply(tile, real, words, 0, words, panel, false, sums);
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
    Down down{p.rank ? pack_down(c, false) : nullptr, 1.0f, p.low};
    if (p.rank && !down.panels) return;
    if (p.rank && (c.drops() || p.few)) {
        multiply_down(c, down, p.in_features, [&](int64_t first, int64_t real) {
            if (!c.drops()) return Rows{x.row(first), x.depth, x.dtype};
            char* dropped = rooms().sums.at_least<char>(c.k.rows * x.bytes());
            if (!c.has(dropped)) return Rows{nullptr, 0, 0};
            for (int64_t r = 0; r < real; ++r)
                kernels().dropout(c.dropout_row(first + r, dropped + r * x.bytes()));
            return Rows{dropped, x.depth, x.dtype};
        });
        down.panels = nullptr;
    }
    if (p.few) {
        fb_linear_4bit(p.x, p.dtype, p.rows, p.in_features, p.out_features, p.codes, p.absmax, p.nested_absmax,
                       p.offset, p.map, p.block_size, p.codebook, p.bias, p.y, c.threads);
        if (p.rank) add_adapter(c);
        return;
    }
    restore_scales(c);
    if (!c.enough.load(std::memory_order_relaxed)) return;
    for_slabs(c, x, down, p.out_features, [&](const Slab& s) {
        char* lines = rooms().lines.at_least<char>(LINES_BYTES);
        if (!c.has(lines)) return;
        multiply_slab(
            c, s,
            [&](int64_t panel, int64_t start, int64_t count, uint32_t* to) {
                c.weight.rows_panel(c.k, panel * c.k.lanes, start, count, lines, to);
            },
            p.rank > 0, [&](int64_t panel, uint32_t* to) { up_panel(c, panel * c.k.lanes, false, to); });
        store_slab(c, s, p.bias, p.out_features, p.y);
    });
}

}  // namespace

int fb_has_product(int dtype) { return product_kernels(dtype) != nullptr; }

int fb_product(const FbProduct* problem, int threads) { return run_product(*problem, threads, forward); }
