// The few-row product, portable.
#include "convert.h"
#include "kernels.h"

namespace scalar {

void prepare(const void* x, int dtype, int64_t K, float* prepared) {
    for (int64_t k = 0; k < K; k += 32) {
        for (int64_t i = 0; i < 16; ++i) {
            prepared[k + i] = load_value(x, dtype, k + 2 * i);
            prepared[k + 16 + i] = load_value(x, dtype, k + 2 * i + 1);
        }
    }
}

void linear(const LinearRows& rows) {
    const int64_t row_blocks = rows.K / rows.block_size;
    for (int64_t n = 0; n < rows.rows; ++n) {
        const uint8_t* codes = rows.codes + n * rows.K / 2;
        for (int64_t m = 0; m < rows.M; ++m) {
            const float* x = rows.x + m * rows.x_stride;
            // Sixteen partial sums: the lanes of a vector where the compiler has them.
            float sums[16] = {};
            for (int64_t k = 0; k < rows.K; k += 32) {
                const float scale = rows.absmax[n * row_blocks + k / rows.block_size];
                for (int64_t i = 0; i < 16; ++i) {
                    const uint8_t byte = codes[k / 2 + i];
                    sums[i] += rows.codebook[byte >> 4] * scale * x[k + i];
                    sums[i] += rows.codebook[byte & 15] * scale * x[k + 16 + i];
                }
            }
            float total = 0.0f;
            for (const float sum : sums) total += sum;
            rows.y[m * rows.rows + n] = total;
        }
    }
}

float dot(const float* a, const float* b, int64_t n) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
    float total = 0.0f;
    for (; i < n; ++i) total += a[i] * b[i];
    for (const float sum : sums) total += sum;
    return total;
}

}  // namespace scalar
