// Loops over values of a dtype that is known where they are compiled, so that they become vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.h"

namespace {

constexpr int LANES = 16;

template <int DTYPE>
inline float load_as(const void* source, int64_t i) {
    if constexpr (DTYPE == FP32) return static_cast<const float*>(source)[i];
    const uint16_t half = static_cast<const uint16_t*>(source)[i];
    if constexpr (DTYPE == BF16) return from_bf16(half);
    return from_fp16(half);
}

// Rounding of finite values; a NaN stays one.
template <int DTYPE>
inline void store_as(void* target, int64_t i, float value) {
    if constexpr (DTYPE == FP32) {
        static_cast<float*>(target)[i] = value;
    } else if constexpr (DTYPE == BF16) {
        const uint32_t bits = bits_of(value);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
        static_cast<uint16_t*>(target)[i] = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : rounded);
    } else {
        static_cast<uint16_t*>(target)[i] = to_fp16(value);
    }
}

// The sum of term(k) over k < K.
template <class Term>
inline float lane_sum(int64_t K, const Term& term) {
    float lanes[LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
        for (int lane = 0; lane < LANES; ++lane) lanes[lane] += term(k + lane);
    for (int lane = 0; k < K; ++k, ++lane) lanes[lane] += term(k);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// What work gives for the dtype, which it gets as a type.
template <class Work>
inline auto with_dtype(int dtype, const Work& work) {
    if (dtype == FP32) return work(std::integral_constant<int, FP32>());
    if (dtype == BF16) return work(std::integral_constant<int, BF16>());
    return work(std::integral_constant<int, FP16>());
}

}  // namespace
