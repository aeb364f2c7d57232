// RMS norm, gated activations and cross-entropy, forward and backward, one row at a time: portable source that each
// instruction set compiles with its own flags.
//
// Sums run over sixteen lanes in a fixed order and nothing is contracted, so that every instruction set
// gives the same bits. Arithmetic is fp32; results are rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"
#include "kernels.h"
#include "lanes.h"

namespace {

struct Activated {
    float value, slope;
};

// The activation of g and its derivative.
template <int KIND>
inline Activated activate(float g) {
    if constexpr (KIND == SILU) {
        const float sigmoid = 1.0f / (1.0f + exponential(-g));
        return {g * sigmoid, sigmoid * (1.0f + g * (1.0f - sigmoid))};
    } else {  // GELU_TANH
        constexpr float C = 0.797884561f, D = 0.044715f;
        const float square = g * g, inner = C * (g + D * g * square);
        const float tanh = 1.0f - 2.0f / (exponential(2.0f * inner) + 1.0f);
        return {0.5f * g * (1.0f + tanh),
                0.5f * (1.0f + tanh) + 0.5f * g * (1.0f - tanh * tanh) * C * (1.0f + 3.0f * D * square)};
    }
}

template <int DTYPE>
void rms_norm_row(const NormRow& row) {
    const void* x = row.x;
    if (row.more) {
        for (int64_t k = 0; k < row.K; ++k)
            store_as<DTYPE>(row.sum, k, load_as<DTYPE>(row.x, k) + load_as<DTYPE>(row.more, k));
        x = row.sum;
    }
    const float squares = lane_sum(row.K, [&](int64_t k) {
        const float value = load_as<DTYPE>(x, k);
        return value * value;
    });
    const float scale = 1.0f / std::sqrt(squares / float(row.K) + row.eps);
    for (int64_t k = 0; k < row.K; ++k) store_as<DTYPE>(row.y, k, load_as<DTYPE>(x, k) * scale * row.weight[k]);
    *row.scale = scale;
}

template <int DTYPE, int COUNT>
void rms_norm_grad_row(const NormGradRow& row) {
    const auto grad = [&](int64_t k) {
        float sum = load_as<DTYPE>(row.grads[0], k);
        if constexpr (COUNT > 1) sum += load_as<DTYPE>(row.grads[1], k);
        if constexpr (COUNT > 2) sum += load_as<DTYPE>(row.grads[2], k);
        return sum;
    };
    const float scale = *row.scale;
    const float inner =
        lane_sum(row.K, [&](int64_t k) { return grad(k) * row.weight[k] * load_as<DTYPE>(row.x, k); });
    // d/dx of x s(x): s g w - x s^3 <g w, x> / K
    const float along = scale * scale * scale * (inner / float(row.K));
    const auto slope = [&](int64_t k) { return scale * (grad(k) * row.weight[k]) - along * load_as<DTYPE>(row.x, k); };
    if (row.passed)
        for (int64_t k = 0; k < row.K; ++k)
            store_as<DTYPE>(row.grad_x, k, slope(k) + load_as<DTYPE>(row.passed, k));
    else
        for (int64_t k = 0; k < row.K; ++k) store_as<DTYPE>(row.grad_x, k, slope(k));
}

template <int DTYPE>
void rms_norm_grad_of(const NormGradRow& row) {
    if (row.grads[2]) return rms_norm_grad_row<DTYPE, 3>(row);
    if (row.grads[1]) return rms_norm_grad_row<DTYPE, 2>(row);
    rms_norm_grad_row<DTYPE, 1>(row);
}

template <int DTYPE, int KIND>
void gated_run(const GatedRun& run) {
    for (int64_t i = 0; i < run.n; ++i)
        store_as<DTYPE>(run.out, i, activate<KIND>(load_as<DTYPE>(run.gate, i)).value * load_as<DTYPE>(run.up, i));
}

template <int DTYPE, int KIND>
void gated_grad_run(const GatedRun& run) {
    for (int64_t i = 0; i < run.n; ++i) {
        const float grad = load_as<DTYPE>(run.grad, i), up = load_as<DTYPE>(run.up, i);
        const Activated at = activate<KIND>(load_as<DTYPE>(run.gate, i));
        store_as<DTYPE>(run.grad_gate, i, grad * up * at.slope);
        store_as<DTYPE>(run.grad_up, i, grad * at.value);
    }
}

// A logit after its factor and its cap.
template <int DTYPE, bool CAP>
inline float capped(const LossRow& row, int64_t k) {
    const float value = load_as<DTYPE>(row.logits, k) * row.scale;
    if constexpr (!CAP) return value;
    return row.softcap * (1.0f - 2.0f / (exponential(2.0f * value / row.softcap) + 1.0f));
}

template <int DTYPE, bool CAP>
void cross_entropy_row(const LossRow& row) {
    int32_t lanes[LANES];  // integers in the order of the floats, of which compilers make vectors
    for (int32_t& lane : lanes) lane = std::numeric_limits<int32_t>::min();
    const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
    const auto raise = [&](int lane, float value) {
        const int32_t place = ordered(int32_t(bits_of(value)));
        lanes[lane] = place > lanes[lane] ? place : lanes[lane];
    };
    int64_t k = 0;
    for (; k + LANES <= row.words; k += LANES)
        for (int lane = 0; lane < LANES; ++lane) raise(lane, capped<DTYPE, CAP>(row, k + lane));
    for (int lane = 0; k < row.words; ++k, ++lane) raise(lane, capped<DTYPE, CAP>(row, k));
    const float highest = float_of(uint32_t(ordered(*std::max_element(lanes, lanes + LANES))));
    double total = 0.0;  // of runs of fp32 sums: a vocabulary has a quarter of a million words
    for (int64_t first = 0; first < row.words; first += 4096)
        total += lane_sum(std::min<int64_t>(4096, row.words - first), [&](int64_t i) {
            return exponential(capped<DTYPE, CAP>(row, first + i) - highest);
        });
    const float wanted = capped<DTYPE, CAP>(row, row.label);
    *row.loss = float(std::log(total) + (double(highest) - wanted));
    if (!row.gradient) return;
    const float share = float(1.0 / total);
    const auto slope = [&](float value, float hit) {
        const float grad = (exponential(value - highest) * share - hit) * row.scale;
        if constexpr (!CAP) return grad;
        const float ratio = value / row.softcap;
        return grad * (1.0f - ratio * ratio);
    };
    for (k = 0; k < row.words; ++k)
        store_as<DTYPE>(row.logits, k, slope(capped<DTYPE, CAP>(row, k), 0.0f));
    store_as<DTYPE>(row.logits, row.label, slope(wanted, 1.0f));
}

}  // namespace

// The kernels of one instruction set, in its namespace; see kernels.h.
#define FB_ELEMENTWISE(isa)                                                   \
    namespace isa {                                                           \
    void rms_norm(const NormRow& row) {                                       \
        if (row.dtype == FP32) rms_norm_row<FP32>(row);                       \
        if (row.dtype == BF16) rms_norm_row<BF16>(row);                       \
        if (row.dtype == FP16) rms_norm_row<FP16>(row);                       \
    }                                                                         \
    void rms_norm_grad(const NormGradRow& row) {                              \
        if (row.dtype == FP32) rms_norm_grad_of<FP32>(row);                   \
        if (row.dtype == BF16) rms_norm_grad_of<BF16>(row);                   \
        if (row.dtype == FP16) rms_norm_grad_of<FP16>(row);                   \
    }                                                                         \
    void gated(const GatedRun& run) {                                         \
        const bool silu = run.kind == SILU;                                   \
        if (run.dtype == FP32) (silu ? gated_run<FP32, SILU> : gated_run<FP32, GELU_TANH>)(run); \
        if (run.dtype == BF16) (silu ? gated_run<BF16, SILU> : gated_run<BF16, GELU_TANH>)(run); \
        if (run.dtype == FP16) (silu ? gated_run<FP16, SILU> : gated_run<FP16, GELU_TANH>)(run); \
    }                                                                         \
    void gated_grad(const GatedRun& run) {                                    \
        const bool silu = run.kind == SILU;                                   \
        if (run.dtype == FP32) (silu ? gated_grad_run<FP32, SILU> : gated_grad_run<FP32, GELU_TANH>)(run); \
        if (run.dtype == BF16) (silu ? gated_grad_run<BF16, SILU> : gated_grad_run<BF16, GELU_TANH>)(run); \
        if (run.dtype == FP16) (silu ? gated_grad_run<FP16, SILU> : gated_grad_run<FP16, GELU_TANH>)(run); \
    }                                                                         \
    void cross_entropy(const LossRow& row) {                                  \
        const bool cap = row.softcap != 0.0f;                                 \
        if (row.dtype == FP32) (cap ? cross_entropy_row<FP32, true> : cross_entropy_row<FP32, false>)(row); \
        if (row.dtype == BF16) (cap ? cross_entropy_row<BF16, true> : cross_entropy_row<BF16, false>)(row); \
        if (row.dtype == FP16) (cap ? cross_entropy_row<FP16, true> : cross_entropy_row<FP16, false>)(row); \
    }                                                                         \
    }
