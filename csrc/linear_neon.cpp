// The few-row product with NEON: the bytes of a block's 16 scaled values stand in four tables, which a
// byte lookup reads for 16 weights at a time; two rounds of zipping make the weights whole.
#include <arm_neon.h>

#include "kernels.h"
#include "unroll.h"

namespace {

// Sixteen weights by the low four bits of each byte of `index`.
inline void look_up(const uint8x16x4_t& table, uint8x16_t index, float32x4_t weights[4]) {
    const uint8x16_t byte0 = vqtbl1q_u8(table.val[0], index), byte1 = vqtbl1q_u8(table.val[1], index);
    const uint8x16_t byte2 = vqtbl1q_u8(table.val[2], index), byte3 = vqtbl1q_u8(table.val[3], index);
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
    const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    weights[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
    weights[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
    weights[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
    weights[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
}

// One weight row against M rows of x.
template <int M>
void tile(const LinearRows& rows, int64_t n, int64_t m) {
    const int64_t K = rows.K, row_blocks = K / rows.block_size;
    const uint8_t* codes = rows.codes + n * K / 2;
    const float* x = rows.x + m * rows.x_stride;
    float32x4_t sums[M][4];
    unroll<M>([&](auto i) { unroll<4>([&](auto j) { sums[i][j] = vdupq_n_f32(0.0f); }); });

    for (int64_t block = 0; block < row_blocks; ++block) {
        float scaled[16];
        const float scale = rows.absmax[n * row_blocks + block];
        for (int j = 0; j < 16; j += 4)
            vst1q_f32(scaled + j, vmulq_n_f32(vld1q_f32(rows.codebook + j), scale));
        const uint8x16x4_t table = vld4q_u8(reinterpret_cast<const uint8_t*>(scaled));
        const int64_t end = (block + 1) * rows.block_size;
        for (int64_t k = block * rows.block_size; k < end; k += 32) {
            const uint8x16_t byte = vld1q_u8(codes + k / 2);
            float32x4_t even[4], odd[4];
            look_up(table, vshrq_n_u8(byte, 4), even);
            look_up(table, vandq_u8(byte, vdupq_n_u8(15)), odd);
            unroll<M>([&](auto i) {
                unroll<4>([&](auto j) {
                    const float* at = x + i * rows.x_stride + k + 4 * j;
                    sums[i][j] = vfmaq_f32(sums[i][j], even[j], vld1q_f32(at));
                    sums[i][j] = vfmaq_f32(sums[i][j], odd[j], vld1q_f32(at + 16));
                });
            });
        }
    }
    unroll<M>([&](auto i) {
        rows.y[(m + i) * rows.rows + n] =
            vaddvq_f32(vaddq_f32(vaddq_f32(sums[i][0], sums[i][1]), vaddq_f32(sums[i][2], sums[i][3])));
    });
}

template <int M>
void stripe(const LinearRows& rows, int64_t m) {
    for (int64_t n = 0; n < rows.rows; ++n) tile<M>(rows, n, m);
}

}  // namespace

namespace neon {

void linear(const LinearRows& rows) {
    int64_t m = 0;
    for (; m + 2 <= rows.M; m += 2) stripe<2>(rows, m);
    if (m < rows.M) stripe<1>(rows, m);
}

}  // namespace neon
