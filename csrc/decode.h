// What stands beside the packed products of one decoded token: rotary embedding, attention over a KV cache, an
// adapter's second product, the head. Loops over 16 lanes, as in elementwise.h; compiled for each instruction set.
#pragma once

#include "elementwise.h"

namespace {

template <int DTYPE>
void widen_row(const void* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = load_as<DTYPE>(x, i);
}

template <int DTYPE>
void add_row(void* y, const void* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store_as<DTYPE>(y, i, load_as<DTYPE>(y, i) + load_as<DTYPE>(x, i));
}

template <int DTYPE>
void add_low_row(const LowRow& row) {
    constexpr int64_t RUN = 4 * LANES;
    for (int64_t first = 0; first < row.n; first += RUN) {
        const int64_t count = row.n - first < RUN ? row.n - first : RUN;
        float sums[RUN];
        for (int64_t i = 0; i < count; ++i) sums[i] = load_as<DTYPE>(row.y, first + i);
        for (int64_t j = 0; j < row.rank; ++j) {
            const float* up = row.up + j * row.n + first;
            const float low = row.low[j];
            for (int64_t i = 0; i < count; ++i) sums[i] += low * up[i];
        }
        for (int64_t i = 0; i < count; ++i) store_as<DTYPE>(row.y, first + i, sums[i]);
    }
}

template <int DTYPE>
void rotate_heads(const RotaryRow& row) {
    const int64_t half = row.width / 2;
    for (int64_t head = 0; head < row.heads; ++head) {
        const int64_t from = head * row.stride, to = head * row.width;
        for (int64_t i = 0; i < half; ++i) {
            const float a = load_as<DTYPE>(row.x, from + i), b = load_as<DTYPE>(row.x, from + half + i);
            store_as<DTYPE>(row.y, to + i, a * row.cos[i] - b * row.sin[i]);
            store_as<DTYPE>(row.y, to + half + i, b * row.cos[half + i] + a * row.sin[half + i]);
        }
    }
}

// A slot counts where it holds a token, none that comes later, and none too far back.
inline bool is_visible(const CachedHead& head, int64_t slot) {
    const int64_t own = head.positions[head.slots - 1], position = head.positions[slot];
    return position >= 0 && position <= own && (head.window == 0 || own - position < head.window);
}

template <int DTYPE>
void attend_head(const CachedHead& head) {
    const int64_t width = head.width;
    float *q = head.room, *sums = q + width, *scores = sums + width;
    for (int64_t g = 0; g < head.group; ++g) {
        for (int64_t d = 0; d < width; ++d) q[d] = load_as<DTYPE>(head.q, g * width + d) * head.scale, sums[d] = 0.0f;
        float highest = -INFINITY, total = 0.0f;
        for (int64_t slot = 0; slot < head.slots; ++slot) {
            if (!is_visible(head, slot)) continue;
            const int64_t key = slot * width;
            scores[slot] = lane_sum(width, [&](int64_t d) { return q[d] * load_as<DTYPE>(head.keys, key + d); });
            highest = scores[slot] > highest ? scores[slot] : highest;
        }
        for (int64_t slot = 0; slot < head.slots; ++slot) {
            if (!is_visible(head, slot)) continue;
            const float weight = exponential(scores[slot] - highest);
            const int64_t value = slot * width;
            total += weight;
            for (int64_t d = 0; d < width; ++d) sums[d] += weight * load_as<DTYPE>(head.values, value + d);
        }
        for (int64_t d = 0; d < width; ++d) store_as<DTYPE>(head.out, g * width + d, sums[d] / total);
    }
}

// M rows of x with every row of the weight, 16 running sums for each.
template <int DTYPE, int M>
void dense_tile(const DenseRows& rows) {
    for (int64_t n = 0; n < rows.n; ++n) {
        const int64_t first = n * rows.K;
        float sums[M][LANES] = {};
        int64_t k = 0;
        for (; k + LANES <= rows.K; k += LANES) {
            float weight[LANES];
            for (int lane = 0; lane < LANES; ++lane) weight[lane] = load_as<DTYPE>(rows.weight, first + k + lane);
            for (int lane = 0; lane < LANES; ++lane)
                for (int i = 0; i < M; ++i) sums[i][lane] += weight[lane] * rows.x[i * rows.K + k + lane];
        }
        for (int lane = 0; k < rows.K; ++k, ++lane)
            for (int i = 0; i < M; ++i) sums[i][lane] += load_as<DTYPE>(rows.weight, first + k) * rows.x[i * rows.K + k];
        for (int i = 0; i < M; ++i) {
            for (int half = LANES / 2; half > 0; half /= 2)
                for (int lane = 0; lane < half; ++lane) sums[i][lane] += sums[i][lane + half];
            rows.y[i * rows.n + n] = sums[i][0];
        }
    }
}

template <int DTYPE>
void dense_rows(const DenseRows& rows) {
    if (rows.M == 4) dense_tile<DTYPE, 4>(rows);
    if (rows.M == 3) dense_tile<DTYPE, 3>(rows);
    if (rows.M == 2) dense_tile<DTYPE, 2>(rows);
    if (rows.M == 1) dense_tile<DTYPE, 1>(rows);
}

}  // namespace

// Calls function<dtype>(..) for the dtype at run time.
#define FB_BY_DTYPE(dtype, function, ...)            \
    if ((dtype) == FP32) function<FP32>(__VA_ARGS__); \
    if ((dtype) == BF16) function<BF16>(__VA_ARGS__); \
    if ((dtype) == FP16) function<FP16>(__VA_ARGS__);

#define FB_DECODE(isa)                                                                      \
    namespace isa {                                                                         \
    void widen(const void* x, int dtype, int64_t n, float* out) {                           \
        FB_BY_DTYPE(dtype, widen_row, x, n, out)                                            \
    }                                                                                       \
    void add(void* y, const void* x, int dtype, int64_t n) { FB_BY_DTYPE(dtype, add_row, y, x, n) } \
    void add_low(const LowRow& row) { FB_BY_DTYPE(row.dtype, add_low_row, row) }            \
    void rotate(const RotaryRow& row) { FB_BY_DTYPE(row.dtype, rotate_heads, row) }         \
    void attend(const CachedHead& head) { FB_BY_DTYPE(head.dtype, attend_head, head) }      \
    void dense(const DenseRows& rows) { FB_BY_DTYPE(rows.dtype, dense_rows, rows) }         \
    }
