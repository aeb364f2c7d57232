// The many-row product on packed weights, and its gradient, blocked as a matrix product is (Goto and van de
// Geijn, ACM TOMS 34-3, 2008): a panel of weights is restored into the cache in the order in which it is
// multiplied, meets every row of x, and is forgotten. The restored matrix never exists.
//
// A word is 32 bits: one fp32 value, or two of bf16 that are neighbours in depth, the dimension summed over.
//
//   tile   [words][rows]    some rows of x, packed once
//   panel  [words][lanes]   some columns of the result: rows of W, or in the gradient columns of W
//   sums   [rows][lanes]    fp32
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "codec.h"
#include "convert.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"
#include "scales.h"

namespace {

// Depth of a panel in words: 32 KiB of bf16, 16 of fp32, whose longer sums would be less exact. In steps that are
// whole vectors.
constexpr int64_t MOST_WORDS = 256, MOST_WIDE_WORDS = 128, WORDS_STEP = 32;
// Rows of x that meet a restored panel: so many that restoring takes little of the time where several threads
// share the rows, and so few that a thread has room for them.
constexpr int64_t ENOUGH_ROWS = 256, MOST_ROWS = 1008, TILES_BYTES = 4 << 20;
constexpr int64_t MOST_LANES = 32;
// Bytes between lines, not a power of two: else they would all compete for the same places in the cache.
constexpr int64_t LINE_STRIDE = 4 * MOST_WORDS + 64, LINES_BYTES = MOST_LANES * LINE_STRIDE;

// Memory of a thread, kept between calls; contents are lost where it grows. Null where there is none.
struct Room {
    char* data = nullptr;
    int64_t size = 0;
    ~Room() { ::operator delete(data, std::align_val_t(64)); }

    template <class T>
    T* at_least(int64_t count) {
        const int64_t wanted = count * int64_t(sizeof(T));
        if (wanted > size) {
            ::operator delete(data, std::align_val_t(64));
            data = static_cast<char*>(::operator new(size_t(wanted), std::align_val_t(64), std::nothrow));
            size = data ? wanted : 0;
        }
        return reinterpret_cast<T*>(data);
    }
};

thread_local Room scales_room, tiles_room, panel_room, lines_room, sums_room;

// Which rows of which call a thread's tiles hold.
struct Packed {
    int64_t call, first;
};
std::atomic<int64_t> next_call{1};
thread_local Packed packed{0, 0};

struct Problem {
    const ProductKernels& kernels;
    const void* x;
    int dtype;
    int64_t M, N, K;
    bool gradient;  // whether x is [M, N] and the result [M, K]
    const uint8_t* codes;
    const float* absmax;
    int64_t block_size;
    const float* codebook;
    const void* bias;
    void* y;

    int64_t per_word() const { return dtype == FP32 ? 1 : 2; }
    int64_t depth() const { return gradient ? N : K; }
    int64_t width() const { return gradient ? K : N; }
    int64_t words() const { return ceil_div(depth(), per_word()); }

    // count values of W's row n from column k on.
    void restore(int64_t n, int64_t k, int64_t count, void* out) const {
        const int64_t start = n * K + k;
        dequantize_span(codes, absmax + start / block_size, start, count, block_size, codebook, out, dtype,
                        false);
    }
};

// Rows first .. first + real of x as a tile of `height`, in whole words; what is missing is zero.
void pack_tile(const Problem& p, int64_t first, int64_t real, int64_t height, uint32_t* tile) {
    const int64_t stride = p.depth() * dtype_bytes(p.dtype), whole = stride / 4;
    const char* rows = static_cast<const char*>(p.x) + first * stride;
    p.kernels.transpose(rows, stride, real, whole, tile, height);
    if (stride % 4 == 0) return;
    uint32_t* last = tile + whole * height;
    std::memset(last, 0, size_t(4 * height));
    for (int64_t r = 0; r < real; ++r) std::memcpy(last + r, rows + r * stride + 4 * whole, 2);
}

// Rows first .. first + lanes of W, words start .. start + count of each.
void panel_of_rows(const Problem& p, int64_t first, int64_t start, int64_t count, uint32_t* panel) {
    const int64_t real = std::min(p.kernels.lanes, p.N - first), k = start * p.per_word();
    const int64_t values = std::min(count * p.per_word(), p.K - k), bytes = values * dtype_bytes(p.dtype);
    char* lines = lines_room.at_least<char>(LINES_BYTES);
    for (int64_t lane = 0; lane < real; ++lane) {
        char* line = lines + lane * LINE_STRIDE;
        p.restore(first + lane, k, values, line);
        std::memset(line + bytes, 0, size_t(4 * count - bytes));
    }
    p.kernels.transpose(lines, LINE_STRIDE, real, count, panel, p.kernels.lanes);
}

// Columns first .. first + lanes of W, words start .. start + count of its rows.
void panel_of_columns(const Problem& p, int64_t first, int64_t start, int64_t count, uint32_t* panel) {
    const int64_t lanes = p.kernels.lanes, values = std::min(lanes, p.K - first);
    if (p.K % p.block_size == 0) {
        const int64_t n = start * p.per_word(), rows = std::min(count * p.per_word(), p.N - n);
        p.kernels.columns(p.codes + (n * p.K + first) / 2, p.K / 2, p.absmax + (n * p.K + first) / p.block_size,
                          p.K / p.block_size, rows, p.codebook, panel);
        return;
    }
    const auto line = [&](int64_t n, void* out) {
        const int64_t bytes = n < p.N ? values * dtype_bytes(p.dtype) : 0;
        if (bytes) p.restore(n, first, values, out);
        std::memset(static_cast<char*>(out) + bytes, 0, size_t(lanes * dtype_bytes(p.dtype) - bytes));
    };
    for (int64_t w = 0; w < count; ++w) {
        uint32_t* row = panel + w * lanes;
        if (p.dtype == FP32) {
            line(start + w, row);
            continue;
        }
        uint16_t low[MOST_LANES], high[MOST_LANES];
        line(2 * (start + w), low);
        line(2 * (start + w) + 1, high);
        for (int64_t lane = 0; lane < lanes; ++lane) row[lane] = low[lane] | uint32_t(high[lane]) << 16;
    }
}

// The lanes of the result that begin at `first`, for `rows` rows of x from `first_row` on, packed in tiles; false
// where there is no memory.
bool multiply_panel(const Problem& p, const uint32_t* tiles, int64_t first_row, int64_t rows, int64_t first) {
    const ProductKernels& k = p.kernels;
    const int64_t words = p.words();
    const int64_t blocks = ceil_div(words, p.dtype == FP32 ? MOST_WIDE_WORDS : MOST_WORDS);
    const int64_t step = ceil_div(ceil_div(words, blocks), WORDS_STEP) * WORDS_STEP;
    uint32_t* panel = panel_room.at_least<uint32_t>(MOST_WORDS * MOST_LANES);
    float* sums = sums_room.at_least<float>((rows + k.rows) * k.lanes);
    if (!panel || !sums || !lines_room.at_least<char>(LINES_BYTES)) return false;
    for (int64_t start = 0; start < words; start += step) {
        const int64_t count = std::min(step, words - start);
        (p.gradient ? panel_of_columns : panel_of_rows)(p, first, start, count, panel);
        for (int64_t row = 0; row < rows; row += k.rows) {
            const int64_t height = k.height(std::min(k.rows, rows - row));
            k.multiply(tiles + row * words + start * height, panel, count, height, start > 0,
                       sums + row * k.lanes);
        }
    }
    const int64_t width = std::min(k.lanes, p.width() - first);
    const auto at = [&](const void* base, int64_t i) {
        return const_cast<char*>(static_cast<const char*>(base)) + i * dtype_bytes(p.dtype);
    };
    float bias[MOST_LANES] = {};
    for (int64_t i = 0; p.bias && i < width; ++i) bias[i] = load_value(p.bias, p.dtype, first + i);
    for (int64_t row = 0; row < rows; ++row)
        k.store(sums + row * k.lanes, bias, width, at(p.y, (first_row + row) * p.width() + first));
    return true;
}

// Each thread packs the rows that it multiplies: what another core has just written is slow to read. Returns false
// where there is no memory.
bool multiply(const Problem& p, int threads) {
    const ProductKernels& k = p.kernels;
    const int64_t words = p.words(), panels = ceil_div(p.width(), k.lanes);
    const int64_t fitting = std::min(MOST_ROWS, std::max(k.rows, TILES_BYTES / (4 * words)));
    const int64_t groups = std::max(ceil_div(p.M, fitting), std::min<int64_t>(threads, p.M / ENOUGH_ROWS));
    const int64_t each = ceil_div(ceil_div(p.M, std::max<int64_t>(1, groups)), k.rows) * k.rows;
    const int64_t call = next_call.fetch_add(1, std::memory_order_relaxed);
    std::atomic<bool> done{true};
    parallel_for(ceil_div(p.M, each) * panels, threads, [&](int64_t task) {
        const int64_t first = task / panels * each, rows = std::min(each, p.M - first);
        uint32_t* tiles = tiles_room.at_least<uint32_t>(ceil_div(rows, k.rows) * k.rows * words);
        if (!tiles) {
            done.store(false, std::memory_order_relaxed);
            return;
        }
        if (packed.call != call || packed.first != first) {
            for (int64_t row = 0; row < rows; row += k.rows) {
                const int64_t real = std::min(k.rows, rows - row);
                pack_tile(p, first + row, real, k.height(real), tiles + row * words);
            }
            packed = {call, first};
        }
        if (!multiply_panel(p, tiles, first, rows, task % panels * k.lanes))
            done.store(false, std::memory_order_relaxed);
    });
    return done.load(std::memory_order_relaxed);
}

const ProductKernels* kernels_for(int dtype) {
    return dtype == BF16 ? kernels().product : dtype == FP32 ? kernels().product_wide : nullptr;
}

}  // namespace

int fb_has_product(int dtype) { return kernels_for(dtype) != nullptr; }

int fb_product_4bit(const void* x, int dtype, int64_t M, int64_t N, int64_t K, int gradient,
                    const uint8_t* codes, const void* absmax, const float* nested_absmax, const float* offset,
                    const float* map, int64_t block_size, const float* codebook, const void* bias, void* y,
                    int threads) {
    const ProductKernels* kernels = kernels_for(dtype);
    if (!kernels || M <= 0 || N <= 0 || K <= 0 || !valid_block_size(block_size)) return 1;
    const Scales scales{absmax, nested_absmax, offset, map};
    const int64_t blocks = ceil_div(N * K, block_size);
    const float* restored = static_cast<const float*>(absmax);
    if (nested_absmax) {
        float* room = scales_room.at_least<float>(blocks);
        if (!room) return 2;
        parallel_for(ceil_div(blocks, NESTED_BLOCK_SIZE), threads, [&](int64_t part) {
            const int64_t first = part * NESTED_BLOCK_SIZE;
            scales.run(first, std::min(NESTED_BLOCK_SIZE, blocks - first), room + first);
        });
        restored = room;
    }
    const Problem problem{*kernels, x,        dtype,      M,        N,    K, gradient != 0,
                          codes,    restored, block_size, codebook, bias, y};
    return multiply(problem, threads) ? 0 : 2;
}
