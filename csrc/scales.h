// Block scales, plain or double-quantized, read the same way.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t NESTED_BLOCK_SIZE = 256;

struct Scales {
    const void* absmax;  // fp32, or 8-bit codes when `nested` is given
    const float* nested;
    const float* offset;
    const float* map;

    // The scales of blocks first .. first + count: as they are stored, or restored into `buffer`.
    const float* run(int64_t first, int64_t count, float* buffer) const {
        if (!nested) return static_cast<const float*>(absmax) + first;
        const uint8_t* codes8 = static_cast<const uint8_t*>(absmax) + first;
        const float mean = *offset;
        // Multiplied and added in two roundings, as the reference does.
        for (int64_t i = 0; i < count; ++i)
            buffer[i] = map[codes8[i]] * nested[(first + i) / NESTED_BLOCK_SIZE] + mean;
        return buffer;
    }
};

}  // namespace
