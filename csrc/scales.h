// Blocks and their scales, plain or double-quantized, read the same way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace {

constexpr int64_t NESTED_BLOCK_SIZE = 256;

inline bool valid_block_size(int64_t block_size) {
    return block_size >= 32 && (block_size & (block_size - 1)) == 0;
}

struct Scales {
    const void* absmax;  // fp32, or 8-bit codes when `nested` is given
    const float* nested;
    const float* offset;
    const float* map;

    // The scales of blocks first .. first + count: as they are stored, or restored into `buffer`.
    const float* run(int64_t first, int64_t count, float* buffer) const {
        if (!nested) return static_cast<const float*>(absmax) + first;
        const uint8_t* codes8 = static_cast<const uint8_t*>(absmax) + first;
        for (int64_t i = 0; i < count;) {
            const int64_t block = (first + i) / NESTED_BLOCK_SIZE;
            const int64_t end = std::min(count, (block + 1) * NESTED_BLOCK_SIZE - first);
            kernels().restore(codes8 + i, end - i, map, nested[block], *offset, buffer + i);
            i = end;
        }
        return buffer;
    }
};

}  // namespace
