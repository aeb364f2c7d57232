// The codec with NEON, for aarch64: 16 values at a time when quantizing, 32 when restoring.
//
// Loads and stores that interleave do what AVX does with permutes. A value's position is the number of
// thresholds below it, all 15 of which fit the registers.
#include <arm_neon.h>

#include "convert.h"
#include "kernels.h"

namespace {

struct Pair {
    float32x4_t even[2], odd[2];
};

// 16 consecutive values of w from i on as fp32, even elements apart from odd ones.
template <int DTYPE>
Pair load_pair(const void* w, int64_t i) {
    if constexpr (DTYPE == FP32) {
        const float* source = static_cast<const float*>(w) + i;
        const float32x4x2_t first = vld2q_f32(source), second = vld2q_f32(source + 8);
        return {{first.val[0], second.val[0]}, {first.val[1], second.val[1]}};
    } else {
        const uint16x8x2_t both = vld2q_u16(static_cast<const uint16_t*>(w) + i);
        const auto widen = [](uint16x4_t halves) {
            if constexpr (DTYPE == BF16) return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
            return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        };
        return {{widen(vget_low_u16(both.val[0])), widen(vget_high_u16(both.val[0]))},
                {widen(vget_low_u16(both.val[1])), widen(vget_high_u16(both.val[1]))}};
    }
}

// The largest magnitude of a block, compared as integers.
template <int DTYPE>
float largest_magnitude(const void* w, int64_t start, int64_t count) {
    if constexpr (DTYPE == FP32) {
        uint32x4_t largest = vdupq_n_u32(0);
        const uint32_t* source = static_cast<const uint32_t*>(w) + start;
        for (int64_t i = 0; i < count; i += 4)
            largest = vmaxq_u32(largest, vandq_u32(vld1q_u32(source + i), vdupq_n_u32(0x7fffffff)));
        return float_of(vmaxvq_u32(largest));
    } else {
        uint16x8_t largest = vdupq_n_u16(0);
        const uint16_t* source = static_cast<const uint16_t*>(w) + start;
        for (int64_t i = 0; i < count; i += 8)
            largest = vmaxq_u16(largest, vandq_u16(vld1q_u16(source + i), vdupq_n_u16(0x7fff)));
        const uint16_t magnitude = vmaxvq_u16(largest);
        return DTYPE == BF16 ? from_bf16(magnitude) : from_fp16(magnitude);
    }
}

inline uint8x8_t positions(const float32x4_t values[2], float32x4_t inverse, const float* sorted) {
    uint32x4_t counts[2];
    for (int half = 0; half < 2; ++half) {
        const float32x4_t y = vmulq_f32(values[half], inverse);
        counts[half] = vdupq_n_u32(0);
        for (int i = 0; i < 15; ++i)
            counts[half] = vsubq_u32(counts[half], vcgtq_f32(y, vdupq_n_f32(sorted[i])));
    }
    return vmovn_u16(vcombine_u16(vmovn_u32(counts[0]), vmovn_u32(counts[1])));
}

template <int DTYPE>
void quantize_blocks(const void* w, int64_t blocks, int64_t block_size, const Search& search, uint8_t* codes,
                     float* absmax) {
    uint8_t order[16];
    for (int i = 0; i < 16; ++i) order[i] = uint8_t(search.order[i]);
    const uint8x16_t low_code = vld1q_u8(order), high_code = vshlq_n_u8(low_code, 4);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * block_size;
        absmax[block] = largest_magnitude<DTYPE>(w, start, block_size);
        const float32x4_t inverse = vdupq_n_f32(1.0f / (absmax[block] < 1e-38f ? 1e-38f : absmax[block]));
        for (int64_t i = start; i < start + block_size; i += 16) {
            const Pair values = load_pair<DTYPE>(w, i);
            const uint8x8_t even = positions(values.even, inverse, search.sorted);
            const uint8x8_t odd = positions(values.odd, inverse, search.sorted);
            vst1_u8(codes + i / 2, vorr_u8(vqtbl1_u8(high_code, even), vqtbl1_u8(low_code, odd)));
        }
    }
}

// Four fp32 values rounded to 16 bits, to nearest even.
template <int DTYPE>
uint16x4_t round_to_half(float32x4_t values) {
    if constexpr (DTYPE == FP16) return vreinterpret_u16_f16(vcvt_f16_f32(values));
    const uint32x4_t bits = vreinterpretq_u32_f32(values);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(values, values), rounded, vdupq_n_u32(0x7fc0)));
}

// The 16 rounded values as two tables of bytes; the four-way store interleaves low and high bytes of
// even and odd elements.
template <int DTYPE>
void dequantize_half(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                     const float* codebook, uint16_t* out) {
    for (int64_t block = 0; block < blocks; ++block) {
        uint16_t rounded[16];
        for (int i = 0; i < 16; i += 4)
            vst1_u16(rounded + i, round_to_half<DTYPE>(vmulq_n_f32(vld1q_f32(codebook + i), absmax[block])));
        const uint8x16x2_t table = vld2q_u8(reinterpret_cast<const uint8_t*>(rounded));
        const int64_t start = block * block_size;
        for (int64_t i = start; i < start + block_size; i += 32) {
            const uint8x16_t byte = vld1q_u8(codes + i / 2);
            const uint8x16_t even = vshrq_n_u8(byte, 4), odd = vandq_u8(byte, vdupq_n_u8(15));
            const uint8x16x4_t bytes = {{vqtbl1q_u8(table.val[0], even), vqtbl1q_u8(table.val[1], even),
                                         vqtbl1q_u8(table.val[0], odd), vqtbl1q_u8(table.val[1], odd)}};
            vst4q_u8(reinterpret_cast<uint8_t*>(out + i), bytes);
        }
    }
}

void dequantize_fp32(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                     const float* codebook, float* out) {
    for (int64_t block = 0; block < blocks; ++block) {
        float table[16];
        for (int i = 0; i < 16; i += 4)
            vst1q_f32(table + i, vmulq_n_f32(vld1q_f32(codebook + i), absmax[block]));
        const int64_t start = block * block_size;
        for (int64_t i = start; i < start + block_size; i += 2) {
            out[i] = table[codes[i / 2] >> 4];
            out[i + 1] = table[codes[i / 2] & 15];
        }
    }
}

}  // namespace

namespace neon {

void quantize(const void* w, int dtype, int64_t blocks, int64_t block_size, const Search& search,
              uint8_t* codes, float* absmax) {
    if (dtype == FP32) quantize_blocks<FP32>(w, blocks, block_size, search, codes, absmax);
    if (dtype == BF16) quantize_blocks<BF16>(w, blocks, block_size, search, codes, absmax);
    if (dtype == FP16) quantize_blocks<FP16>(w, blocks, block_size, search, codes, absmax);
}

void dequantize(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                const float* codebook, void* out, int dtype, bool) {
    uint16_t* half = static_cast<uint16_t*>(out);
    if (dtype == FP32) dequantize_fp32(codes, absmax, blocks, block_size, codebook, static_cast<float*>(out));
    if (dtype == BF16) dequantize_half<BF16>(codes, absmax, blocks, block_size, codebook, half);
    if (dtype == FP16) dequantize_half<FP16>(codes, absmax, blocks, block_size, codebook, half);
}

}  // namespace neon
