// e^x in plain arithmetic, so that loops over it become vectors of whatever width.
#pragma once

#include <cstdint>

#include "convert.h"

// -87.3 and 88.7. Were they known to the compiler, it would work out the results at the bounds and multiply them
// everywhere, chosen or not; they are subnormal numbers, and Intel's processors take a hundred cycles for a vector of
// those. Defined in elementwise.cpp.
extern const float LEAST_EXPONENT, LARGEST_EXPONENT;

namespace {

// To 2 units in the last place; below the least the smallest normal number, above the largest the largest power.
inline float exponential(float x) {
    x = x < LEAST_EXPONENT ? LEAST_EXPONENT : x;
    x = x > LARGEST_EXPONENT ? LARGEST_EXPONENT : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    // n reaches 128, whose power of two is not finite: two factors.
    const int32_t whole = int32_t(n), half = whole >> 1;
    const float first = float_of(uint32_t(half + 127) << 23);
    return p * first * float_of(uint32_t(whole - half + 127) << 23);
}

}  // namespace
