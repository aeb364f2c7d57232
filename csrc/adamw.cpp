// AdamW on a run of weights: one pass over weights, gradients and states.
//
// Every operation is rounded to fp32 on its own and in the order of fourbit.reference.adamw, so the results
// are the reference's bytes, whatever the number of threads and wherever the states lie.
#include <algorithm>
#include <cmath>

#include "dynamic.h"
#include "fourbit.h"
#include "parallel.h"

namespace {

constexpr int64_t TASK = 1 << 14;
static_assert(TASK % NESTED_BLOCK_SIZE == 0, "a block of 8-bit states is one task's");

struct Coefficients {
    float decay, mean_keep, mean_take, square_keep, square_take, correction, eps, rate;
};

Coefficients read(const float* c) { return {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]}; }

void update(float* weight, const float* grad, float* mean, float* square, int64_t count, const Coefficients& c) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = grad[i];
        const float m = mean[i] * c.mean_keep + g * c.mean_take;
        const float v = square[i] * c.square_keep + (g * g) * c.square_take;
        mean[i] = m;
        square[i] = v;
        const float bottom = std::sqrt(v) * c.correction + c.eps;
        weight[i] = weight[i] * c.decay - (m / bottom) * c.rate;
    }
}

void unpack(const uint8_t* code, float absmax, const float* map, int64_t count, float* value) {
    for (int64_t i = 0; i < count; ++i) value[i] = map[code[i]] * absmax;
}

// Returns the block's absmax.
float pack(const float* value, int64_t count, const float* thresholds, uint8_t* code) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(value[i]));
    const float scale = std::max(largest, 1e-38f);
    float y[NESTED_BLOCK_SIZE];
    for (int64_t i = 0; i < count; ++i) y[i] = value[i] / scale;
    find_codes(y, count, thresholds, code);
    return largest;
}

}  // namespace

int fb_adamw(float* weight, const float* grad, float* mean, float* square, int64_t n,
             const float* coefficients, int threads) {
    if (n < 0) return 1;
    const Coefficients c = read(coefficients);
    parallel_for(ceil_div(n, TASK), threads, [&](int64_t task) {
        const int64_t at = task * TASK;
        update(weight + at, grad + at, mean + at, square + at, std::min(TASK, n - at), c);
    });
    return 0;
}

int fb_adamw_8bit(float* weight, const float* grad, uint8_t* mean, float* mean_absmax, uint8_t* square,
                  float* square_absmax, int64_t n, const float* coefficients, const float* maps,
                  const float* thresholds, int threads) {
    if (n < 0) return 1;
    const Coefficients c = read(coefficients);
    constexpr int64_t BLOCK = NESTED_BLOCK_SIZE;
    parallel_for(ceil_div(n, TASK), threads, [&](int64_t task) {
        const int64_t end = std::min(n, (task + 1) * TASK);
        for (int64_t at = task * TASK; at < end; at += BLOCK) {
            const int64_t count = std::min(BLOCK, end - at), block = at / BLOCK;
            float m[BLOCK], v[BLOCK];
            unpack(mean + at, mean_absmax[block], maps, count, m);
            unpack(square + at, square_absmax[block], maps + 256, count, v);
            update(weight + at, grad + at, m, v, count, c);
            mean_absmax[block] = pack(m, count, thresholds, mean + at);
            square_absmax[block] = pack(v, count, thresholds + 255, square + at);
            // A square that is not zero must not become zero: the step would be divided by eps alone.
            for (int64_t i = 0; i < count; ++i)
                if (v[i] > 0.0f && square[at + i] == 0) square[at + i] = 1;
        }
    });
    return 0;
}
