// RMS norm, gated activations, rotary embedding and cross-entropy: argument checks and the split over threads.
#include <algorithm>

#include "convert.h"
#include "exponential.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"

const float LEAST_EXPONENT = -87.3f, LARGEST_EXPONENT = 88.7f;

namespace {

// Values per task: enough to be worth a thread, few enough to stay in its cache.
constexpr int64_t TASK = 1 << 14;
constexpr int64_t WIDEST_HEAD = 1024;

// Calls `body` for each of T rows of K values.
template <class Body>
void each_row(int64_t T, int64_t K, int threads, const Body& body) {
    const int64_t per_task = std::max<int64_t>(1, TASK / std::max<int64_t>(1, K));
    parallel_for(ceil_div(T, per_task), threads, [&](int64_t task) {
        for (int64_t t = task * per_task; t < std::min(T, (task + 1) * per_task); ++t) body(t);
    });
}

const char* at(const void* base, int64_t index, int dtype) {
    return static_cast<const char*>(base) + index * dtype_bytes(dtype);
}

char* at(void* base, int64_t index, int dtype) { return static_cast<char*>(base) + index * dtype_bytes(dtype); }

}  // namespace

int fb_rms_norm(const void* x, const void* more, int dtype, int64_t T, int64_t K, const float* weight, float eps,
                void* sum, void* y, float* scale, int threads) {
    if (!known_dtype(dtype) || T < 0 || K <= 0) return 1;
    each_row(T, K, threads, [&](int64_t t) {
        kernels().rms_norm({at(x, t * K, dtype), more ? at(more, t * K, dtype) : nullptr,
                            more ? at(sum, t * K, dtype) : nullptr, weight, at(y, t * K, dtype), scale + t, dtype, K,
                            eps});
    });
    return 0;
}

int fb_rms_norm_grad(const void* grad, const void* second, const void* third, const void* passed, const void* x,
                     int dtype, int64_t T, int64_t K, const float* weight, const float* scale, void* grad_x,
                     int threads) {
    if (!known_dtype(dtype) || T < 0 || K <= 0 || (third && !second)) return 1;
    each_row(T, K, threads, [&](int64_t t) {
        const auto row = [&](const void* tensor) -> const void* { return tensor ? at(tensor, t * K, dtype) : nullptr; };
        kernels().rms_norm_grad({{row(grad), row(second), row(third)}, row(passed), row(x), weight,
                                 at(grad_x, t * K, dtype), scale + t, dtype, K});
    });
    return 0;
}

int fb_gated(const void* gate, const void* up, int dtype, int64_t n, int kind, void* out, int threads) {
    if (!known_dtype(dtype) || n < 0 || kind < SILU || kind > GELU_TANH) return 1;
    parallel_for(ceil_div(n, TASK), threads, [&](int64_t task) {
        const int64_t i = task * TASK;
        kernels().gated({at(gate, i, dtype), at(up, i, dtype), nullptr, at(out, i, dtype), nullptr, nullptr, dtype,
                         kind, std::min(TASK, n - i)});
    });
    return 0;
}

int fb_gated_grad(const void* grad, const void* gate, const void* up, int dtype, int64_t n, int kind,
                  void* grad_gate, void* grad_up, int threads) {
    if (!known_dtype(dtype) || n < 0 || kind < SILU || kind > GELU_TANH) return 1;
    parallel_for(ceil_div(n, TASK), threads, [&](int64_t task) {
        const int64_t i = task * TASK;
        kernels().gated_grad({at(gate, i, dtype), at(up, i, dtype), at(grad, i, dtype), nullptr,
                              at(grad_gate, i, dtype), at(grad_up, i, dtype), dtype, kind, std::min(TASK, n - i)});
    });
    return 0;
}

int fb_rotary(const void* x, int dtype, int64_t batch, int64_t length, int64_t heads, int64_t width,
              int64_t x_batch, int64_t x_row, int64_t x_head, const void* cos, const void* sin,
              int64_t angles_batch, int back, void* y, int threads) {
    if (!known_dtype(dtype) || batch < 0 || length < 0 || heads <= 0) return 1;
    if (width <= 0 || width % 2 != 0 || width > WIDEST_HEAD) return 1;
    each_row(batch * length, heads * width, threads, [&](int64_t t) {
        const int64_t row = t / length, place = t % length, half = width / 2;
        const int64_t angles = row * angles_batch + place * width;
        float turn[WIDEST_HEAD], lift[WIDEST_HEAD];
        for (int64_t i = 0; i < width; ++i) {
            const int64_t from = back ? (i + half) % width : i;
            turn[i] = load_value(cos, dtype, angles + i);
            lift[i] = back ? -load_value(sin, dtype, angles + from) : load_value(sin, dtype, angles + from);
        }
        kernels().rotate({at(x, row * x_batch + place * x_row, dtype), at(y, t * heads * width, dtype), dtype, heads,
                          width, x_head, turn, lift});
    });
    return 0;
}

int fb_cross_entropy(void* logits, int dtype, int64_t R, int64_t V, const int64_t* labels, float scale, float softcap,
                     int gradient, float* loss, int threads) {
    if (!known_dtype(dtype) || R < 0 || V <= 0) return 1;
    if (std::any_of(labels, labels + R, [V](int64_t label) { return label < 0 || label >= V; })) return 1;
    each_row(R, V, threads, [&](int64_t r) {
        kernels().cross_entropy({at(logits, r * V, dtype), dtype, V, labels[r], scale, softcap, gradient != 0, loss + r});
    });
    return 0;
}
