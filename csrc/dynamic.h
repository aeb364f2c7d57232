// Nearest values of an 8-bit data type that is given by the 255 midpoints between its values.
#pragma once

#include <cstdint>

#include "scales.h"

namespace {

// code[i] = the number of the 255 thresholds below y[i]. The values of a block descend together,
// because one value's eight steps each wait for the one before.
void find_codes(const float* y, int64_t count, const float* thresholds, uint8_t* code) {
    uint32_t below[NESTED_BLOCK_SIZE] = {};
    for (uint32_t half = 128; half > 0; half /= 2)
        for (int64_t i = 0; i < count; ++i) below[i] += y[i] > thresholds[below[i] + half - 1] ? half : 0;
    for (int64_t i = 0; i < count; ++i) code[i] = uint8_t(below[i]);
}

}  // namespace
