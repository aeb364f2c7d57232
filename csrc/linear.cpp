// The few-row product on packed weights: argument checks, scales, the split over threads, and rows
// whose length is not a whole number of blocks.
#include <algorithm>
#include <new>

#include "codec.h"
#include "fourbit.h"
#include "kernels.h"
#include "lanes.h"
#include "parallel.h"
#include "scales.h"

namespace {

// Weight rows per task, and rows of x multiplied at a time: bounds of the stack buffers below.
constexpr int64_t TASK_ROWS = 16, TILE_M = 32;
// Rows of x that are turned at a time.
constexpr int64_t TURNED = 16;
// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t SERIAL_WORK = 1 << 19;

// Floats that hold a prepared row of x.
int64_t prepared_size(int64_t K) { return ceil_div(K, 128) * 128; }

// Scratch memory of a thread, kept between calls so that small products do not allocate.
struct Scratch {
    float* data = nullptr;
    int64_t size = 0;
    ~Scratch() { release(); }

    void release() { ::operator delete(data, std::align_val_t(64)); }

    float* at_least(int64_t wanted) {
        if (wanted > size) {
            release();
            data = nullptr;
            data = static_cast<float*>(::operator new(size_t(wanted) * sizeof(float), std::align_val_t(64)));
            size = wanted;
        }
        return data;
    }
};

thread_local Scratch input_scratch, turned_scratch, scale_scratch, row_scratch;

struct Problem {
    const void* x;
    int dtype;
    int64_t M, K, N;
    const uint8_t* codes;
    Scales scales;
    int64_t block_size;
    const float* codebook;
    const void* bias;
    void* y;
    bool turned;  // x
};

void write(const Problem& p, int64_t first_m, int64_t count_m, int64_t first_n, int64_t count_n,
           const float* sums) {
    float bias[TASK_ROWS] = {};
    for (int64_t n = 0; p.bias && n < count_n; ++n) bias[n] = load_value(p.bias, p.dtype, first_n + n);
    with_dtype(p.dtype, [&](auto dtype) {
        for (int64_t m = 0; m < count_m; ++m)
            for (int64_t n = 0; n < count_n; ++n)
                store_as<dtype>(p.y, (first_m + m) * p.N + first_n + n, sums[m * count_n + n] + bias[n]);
    });
}

// Rows made of whole blocks: the codes are multiplied as they are.
void multiply_packed(const Problem& p, const float* x, int64_t first_n, int64_t count_n) {
    const int64_t row_blocks = p.K / p.block_size, x_stride = prepared_size(p.K);
    float* buffer = p.scales.nested ? scale_scratch.at_least(count_n * row_blocks) : nullptr;
    const float* absmax = p.scales.run(first_n * row_blocks, count_n * row_blocks, buffer);
    float sums[TILE_M * TASK_ROWS];
    for (int64_t m = 0; m < p.M; m += TILE_M) {
        const int64_t count_m = std::min(TILE_M, p.M - m);
        kernels().linear({x + m * x_stride, x_stride, p.dtype, count_m, p.K, p.codes + first_n * p.K / 2,
                          absmax, count_n, p.block_size, p.codebook, sums, p.turned});
        write(p, m, count_m, first_n, count_n, sums);
    }
}

// Any other row length: a row is decoded to fp32 and multiplied.
void multiply_decoded(const Problem& p, const float* x, int64_t first_n, int64_t count_n) {
    const int64_t most_blocks = p.K / p.block_size + 2;
    float* weight = row_scratch.at_least(p.K);
    float* buffer = p.scales.nested ? scale_scratch.at_least(most_blocks) : nullptr;
    for (int64_t n = first_n; n < first_n + count_n; ++n) {
        const int64_t start = n * p.K, first_block = start / p.block_size;
        const int64_t blocks = ceil_div(start + p.K, p.block_size) - first_block;
        dequantize_span(p.codes, p.scales.run(first_block, blocks, buffer), start, p.K, p.block_size,
                        p.codebook, weight, FP32, false);
        for (int64_t m = 0; m < p.M; ++m) {
            const float sum = kernels().dot(x + m * prepared_size(p.K), weight, p.K);
            write(p, m, 1, n, 1, &sum);
        }
    }
}

}  // namespace

int fb_linear_4bit(const void* x, int dtype, int64_t M, int64_t K, int64_t N, const uint8_t* codes,
                   const void* absmax, const float* nested_absmax, const float* offset, const float* map,
                   int64_t block_size, const float* codebook, const void* bias, void* y, int threads) {
    if (!known_dtype(dtype) || M < 0 || K < 0 || N < 0 || !valid_block_size(block_size)) return 1;
    const bool packed = K % block_size == 0, turned = packed && M > 1 && dtype == BF16 && kernels().turn;
    const Problem p{x,          dtype,    M,    K, N,     codes, {absmax, nested_absmax, offset, map},
                    block_size, codebook, bias, y, turned};
    const int64_t stride = prepared_size(K);
    float* prepared = input_scratch.at_least(M * stride);
    for (int64_t m = 0; m < M; ++m) {
        const void* row = static_cast<const char*>(x) + m * K * dtype_bytes(dtype);
        float* target = prepared + m * stride;
        if (packed)
            kernels().prepare(row, dtype, K, target);
        else
            for (int64_t k = 0; k < K; ++k) target[k] = load_value(row, dtype, k);
    }
    if (turned) {
        const float* rows = prepared;
        prepared = turned_scratch.at_least(ceil_div(M, TURNED) * TURNED * stride);
        for (int64_t m = 0; m < M; m += TURNED)
            kernels().turn(rows + m * stride, stride, std::min(TURNED, M - m), prepared + m * stride);
    }
    parallel_for(ceil_div(N, TASK_ROWS), M * N * K < SERIAL_WORK ? 1 : threads, [&](int64_t task) {
        const int64_t first_n = task * TASK_ROWS, count_n = std::min(TASK_ROWS, N - first_n);
        (packed ? multiply_packed : multiply_decoded)(p, prepared, first_n, count_n);
    });
    return 0;
}
