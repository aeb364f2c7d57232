// The 4-bit codec: argument checks, the split over threads, and blocks that are not whole.
#include "codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "convert.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"
#include "scales.h"

namespace {

// Values per task: long enough to hide the hand-out, short enough to balance.
constexpr int64_t TASK_VALUES = 1 << 16;
// Outputs larger than this would only push useful data out of the last-level cache.
constexpr int64_t STREAM_BYTES = 16 << 20;
// A block's scale is never inverted below this (bitsandbytes' limit, which keeps 1 / scale finite).
constexpr float SMALLEST_SCALE = 1e-38f;

bool valid(int dtype, int64_t n, int64_t block_size) {
    return known_dtype(dtype) && n >= 0 && valid_block_size(block_size);
}

Search make_search(const float* thresholds, const uint8_t* order) {
    Search search;
    for (int i = 0; i < 15; ++i) {
        // Scaled values are clamped to [-1, 1], so none is greater than a threshold of 1; rounding in
        // the scaling would otherwise exceed it.
        search.sorted[i] = thresholds[i] >= 1.0f ? std::numeric_limits<float>::infinity() : thresholds[i];
    }
    search.sorted[15] = std::numeric_limits<float>::infinity();
    search.tree[0] = 0.0f;
    for (int depth = 0; depth < 4; ++depth)
        for (int j = 0; j < (1 << depth); ++j)
            search.tree[(1 << depth) + j] = search.sorted[((2 * j + 1) << (3 - depth)) - 1];
    for (int i = 0; i < 16; ++i) search.order[i] = order[i];
    return search;
}

uint8_t code_of(float y, const Search& search) {
    int position = 0;
    for (int i = 0; i < 15; ++i) position += y > search.sorted[i];
    return uint8_t(search.order[position]);
}

// The short last block. bitsandbytes divides here where whole blocks multiply by the reciprocal.
void quantize_tail(const void* w, int dtype, int64_t start, int64_t count, const Search& search,
                   uint8_t* codes, float* absmax) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float magnitude = std::fabs(load_value(w, dtype, start + i));
        if (!(magnitude <= largest)) largest = magnitude;  // a NaN is taken, and then kept
    }
    *absmax = largest;
    const float scale = largest < SMALLEST_SCALE ? SMALLEST_SCALE : largest;
    const auto code = [&](int64_t i) {
        // An odd end is padded with the value zero.
        return i < count ? code_of(load_value(w, dtype, start + i) / scale, search) : code_of(0.0f, search);
    };
    for (int64_t i = 0; i < count; i += 2) codes[i / 2] = uint8_t(code(i) << 4 | code(i + 1));
}

}  // namespace

int64_t fb_find_nonfinite(const void* w, int dtype, int64_t n, int threads) {
    if (!known_dtype(dtype)) return -1;
    const int64_t tasks = ceil_div(n, TASK_VALUES);
    std::atomic<int64_t> first_task{tasks};
    parallel_for(tasks, threads, [&](int64_t task) {
        const int64_t start = task * TASK_VALUES, count = std::min(TASK_VALUES, n - start);
        const char* part = static_cast<const char*>(w) + start * dtype_bytes(dtype);
        if (task > first_task.load() || !kernels().has_nonfinite(part, dtype, count)) return;
        int64_t seen = first_task.load();
        while (task < seen && !first_task.compare_exchange_weak(seen, task)) {
        }
    });
    for (int64_t i = first_task.load() * TASK_VALUES; i < n; ++i)
        if (!std::isfinite(load_value(w, dtype, i))) return i;
    return -1;
}

int fb_quantize_4bit(const void* w, int dtype, int64_t n, int64_t block_size, const float* thresholds,
                     const uint8_t* order, uint8_t* codes, float* absmax, int threads) {
    if (!valid(dtype, n, block_size)) return 1;
    const Search search = make_search(thresholds, order);
    const int64_t whole = n / block_size, per_task = std::max<int64_t>(1, TASK_VALUES / block_size);
    parallel_for(ceil_div(whole, per_task), threads, [&](int64_t task) {
        const int64_t first = task * per_task, start = first * block_size;
        kernels().quantize(static_cast<const char*>(w) + start * dtype_bytes(dtype), dtype,
                           std::min(per_task, whole - first), block_size, search, codes + start / 2,
                           absmax + first);
    });
    const int64_t done = whole * block_size;
    if (done < n) quantize_tail(w, dtype, done, n - done, search, codes + done / 2, absmax + whole);
    return 0;
}

void dequantize_span(const uint8_t* codes, const float* absmax, int64_t start, int64_t count,
                     int64_t block_size, const float* codebook, void* out, int dtype, bool stream) {
    const int64_t first_block = start / block_size, end = start + count;
    const auto one = [&](int64_t i) {
        const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        store_value(out, dtype, i - start, codebook[code] * absmax[i / block_size - first_block]);
    };
    int64_t i = start;
    while (i < end) {
        const int64_t block = i / block_size, block_end = std::min(end, (block + 1) * block_size);
        // Kernels take whole blocks of any length that is a multiple of 32, from a byte boundary: a
        // run of the tensor's own blocks, or the middle of one as a block by itself.
        const bool aligned = i % block_size == 0 && end - i >= block_size;
        const int64_t blocks = aligned ? (end - i) / block_size : 1;
        const int64_t length = aligned ? block_size : (block_end - i) / 32 * 32;
        if (i % 2 == 0 && length > 0) {
            kernels().dequantize(codes + i / 2, absmax + (block - first_block), blocks, length, codebook,
                                 static_cast<char*>(out) + (i - start) * dtype_bytes(dtype), dtype, stream);
            i += blocks * length;
        } else {
            const int64_t stop = i % 2 ? i + 1 : block_end;
            for (; i < stop; ++i) one(i);
        }
    }
}

int fb_dequantize_4bit(const uint8_t* codes, const void* absmax, const float* nested_absmax,
                       const float* offset, const float* map, int64_t n, int64_t block_size,
                       const float* codebook, void* out, int dtype, int threads) {
    if (!valid(dtype, n, block_size)) return 1;
    const Scales scales{absmax, nested_absmax, offset, map};
    const int64_t blocks = ceil_div(n, block_size);
    const int64_t per_task = std::max<int64_t>(1, TASK_VALUES / block_size);
    const bool stream = n * dtype_bytes(dtype) > STREAM_BYTES && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    parallel_for(ceil_div(blocks, per_task), threads, [&](int64_t task) {
        float buffer[TASK_VALUES / 32];
        const int64_t first = task * per_task, count = std::min(per_task, blocks - first);
        const int64_t start = first * block_size;
        dequantize_span(codes, scales.run(first, count, buffer), start,
                        std::min(count * block_size, n - start), block_size, codebook,
                        static_cast<char*>(out) + start * dtype_bytes(dtype), dtype, stream);
    });
    return 0;
}
