// The gradients of the many-row product: in x with the same panels, of which lanes are columns of W; in A and B as
// products over the rows of x, whose dropout mask is one bit a value.
#include "product_call.h"

namespace {

// Which values of x dropout keeps, [M, mask words].
const uint32_t* kept_bits(Call& c) {
    uint32_t* bits = rooms().bits.at_least<uint32_t>(c.p.rows * c.mask_words());
    if (!c.has(bits)) return nullptr;
    parallel_for(c.p.rows, c.threads,
                 [&](int64_t m) { c.k.kept(c.dropout_row(m, nullptr), bits + m * c.mask_words()); });
    return bits;
}

void gradient_of_x(Call& c, const Rows& grad, const Down& down, const uint32_t* bits, float kept_scale) {
    const FbProduct& p = c.p;
    const int64_t low = c.low_words(), words = words_of(c.k, p.out_features, p.dtype) + low;
    for_slabs(c, grad, down, p.in_features, [&](const Slab& s) {
        const auto up = [&](int64_t panel, uint32_t* to) { up_panel(c, panel * c.k.lanes, true, to); };
        multiply_slab(
            c, s,
            [&](int64_t panel, int64_t start, int64_t count, uint32_t* to) {
                c.weight.columns_panel(c.k, panel * c.k.lanes, start, count, to);
            },
            p.rank > 0 && !bits, up);
        for (int64_t i = 0; bits && i < s.panels; ++i) {
            alignas(64) float more[MOST_HEIGHT * MOST_LANES];
            const int64_t lane = (s.first_panel + i) * c.k.lanes;
            float* sums = s.sums + i * s.padded * c.k.lanes;
            up(s.first_panel + i, s.room);
            for (int64_t row = 0; row < s.rows; row += c.k.rows) {
                const int64_t real = std::min(c.k.rows, s.rows - row);
                c.k.multiply(s.tiles + row * words, real, words, words - low, low, s.room, false, more);
                for (int64_t r = 0; r < real; ++r) {
                    const uint32_t* mask = bits + (s.first_row + row + r) * c.mask_words();
                    c.k.add_kept(more + r * c.k.lanes, mask[lane / 32] >> (lane % 32), kept_scale,
                                 sums + (row + r) * c.k.lanes);
                }
            }
        }
        store_slab(c, s, nullptr, p.in_features, p.grad_x);
    });
}

// to [real, rows] = columns first .. first + real of from [rows, width].
template <class Value>
void transpose_values(const void* from, int64_t width, int64_t first, int64_t real, int64_t rows, void* to) {
    constexpr int64_t LINE = 64 / sizeof(Value);  // a line of the cache at a time: `to` has far between its rows
    for (int64_t row = 0; row < rows; row += LINE)
        for (int64_t r = 0; r < real; ++r)
            for (int64_t i = row; i < std::min(rows, row + LINE); ++i)
                static_cast<Value*>(to)[r * rows + i] = static_cast<const Value*>(from)[i * width + first + r];
}

// [r, columns] = low^T times `right` [M, columns], times scale: as it is, or transposed.
void gradient_of_adapter(Call& c, const void* low, const Rows& right, const uint32_t* bits, float scale,
                         bool transposed, float* out) {
    const FbProduct& p = c.p;
    const int64_t words = words_of(c.k, p.rows, p.dtype), step = panel_words(words, p.dtype), per = per_word(p.dtype);
    const int64_t bytes = dtype_bytes(p.dtype), tiles_of_rank = ceil_div(p.rank, c.k.rows);
    // low^T in tiles.
    uint32_t* tiles = rooms().down.at_least<uint32_t>(tiles_of_rank * c.k.rows * words);
    if (!c.has(tiles)) return;
    parallel_for(tiles_of_rank, c.threads, [&](int64_t tile) {
        const int64_t first = tile * c.k.rows, real = std::min(c.k.rows, p.rank - first), height = c.k.height(real);
        char* lines = rooms().rows.at_least<char>(real * p.rows * bytes);
        if (!c.has(lines)) return;
        if (bytes == 2)
            transpose_values<uint16_t>(low, p.rank, first, real, p.rows, lines);
        else
            transpose_values<uint32_t>(low, p.rank, first, real, p.rows, lines);
        c.k.pack(lines, p.rows * bytes, real, words, height, tiles + first * words);
    });
    parallel_for(ceil_div(right.depth, c.k.lanes), c.threads, [&](int64_t task) {
        const int64_t lane = task * c.k.lanes, width = std::min(c.k.lanes, right.depth - lane);
        uint32_t* panel = rooms().panel.at_least<uint32_t>(MOST_WORDS * MOST_LANES);
        float* sums = rooms().sums.at_least<float>((p.rank + c.k.rows) * c.k.lanes);
        if (!c.has(panel) || !c.has(sums)) return;
        for (int64_t start = 0; start < words; start += step) {
            const int64_t count = std::min(step, words - start);
            pack_columns(c.k, right, lane, start * per, std::min(count * per, p.rows - start * per), bits,
                         c.mask_words(), count, panel);
            c.k.multiply(tiles, p.rank, words, start, count, panel, start > 0, sums);
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
    // grad_low [M,r] = scaling grad B.
    Down down{nullptr, p.scaling, nullptr};
    if (p.rank) {
        down.panels = pack_down(c, true);
        down.low = rooms().low.at_least<char>(p.rows * p.rank * dtype_bytes(p.dtype));
        if (!down.panels || !c.has(down.low)) return;
    }
    const uint32_t* bits = c.drops() ? kept_bits(c) : nullptr;
    if (p.grad_x) restore_scales(c);
    if (!c.enough.load(std::memory_order_relaxed)) return;
    const float kept_scale = c.drops() ? c.dropout_row(0, nullptr).scale : 1.0f;
    if (p.grad_x)
        gradient_of_x(c, grad, down, bits, kept_scale);
    else if (p.rank)
        multiply_down(c, down, p.out_features,
                      [&](int64_t first, int64_t) { return Rows{grad.row(first), grad.depth, grad.dtype}; });
    if (p.rank && p.grad_a) {
        gradient_of_adapter(c, down.low, x, bits, kept_scale, false, p.grad_a);
        gradient_of_adapter(c, p.low, grad, nullptr, p.scaling, true, p.grad_b);
    }
}

}  // namespace

int fb_product_grad(const FbProduct* problem, int threads) { return run_product(*problem, threads, backward); }
