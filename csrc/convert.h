// Scalar conversions between fp32, bf16 and fp16, rounding to nearest even as torch does.
//
// Everything here is in an unnamed namespace: the files that include it are compiled for different
// instruction sets, and a shared inline function could be linked from the wrong one.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

enum Dtype : int { FP32 = 0, BF16 = 1, FP16 = 2 };

inline bool known_dtype(int dtype) { return dtype == FP32 || dtype == BF16 || dtype == FP16; }
inline int64_t dtype_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_fp16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
    return float_of(sign | bits_of(float(int32_t(magnitude)) * 0x1p-24f));
}

inline uint16_t to_fp16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    // Subnormal result: one ulp of 0.5f is 2^-24, fp16's smallest step, so the addition rounds.
    if (magnitude < 0x38800000u) return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    magnitude += 0xfffu + ((magnitude >> 13) & 1);
    return uint16_t(sign | ((magnitude - 0x38000000u) >> 13));
}

inline float load_value(const void* source, int dtype, int64_t i) {
    if (dtype == FP32) return static_cast<const float*>(source)[i];
    const uint16_t half = static_cast<const uint16_t*>(source)[i];
    return dtype == BF16 ? from_bf16(half) : from_fp16(half);
}

inline void store_value(void* target, int dtype, int64_t i, float value) {
    if (dtype == FP32)
        static_cast<float*>(target)[i] = value;
    else
        static_cast<uint16_t*>(target)[i] = dtype == BF16 ? to_bf16(value) : to_fp16(value);
}

}  // namespace
