// The portable kernels: what every other instruction set must equal.
#include "convert.h"
#include "kernels.h"

namespace {

template <int DTYPE>
void quantize_blocks(const void* w, int64_t blocks, int64_t block_size, const Search& search, uint8_t* codes,
                     float* absmax) {
    const auto code_of = [&](float y) {
        int node = 1;
        for (int step = 0; step < 4; ++step) node = 2 * node + (y > search.tree[node]);
        return search.order[node - 16];
    };
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * block_size;
        // Magnitudes compared as integers: the same order for finite values, and NaN above all.
        uint32_t largest = 0;
        for (int64_t i = 0; i < block_size; ++i) {
            const uint32_t magnitude = bits_of(load_value(w, DTYPE, start + i)) & 0x7fffffffu;
            if (magnitude > largest) largest = magnitude;
        }
        absmax[block] = float_of(largest);
        const float inverse = 1.0f / (absmax[block] < 1e-38f ? 1e-38f : absmax[block]);
        for (int64_t i = start; i < start + block_size; i += 2) {
            const uint32_t high = code_of(load_value(w, DTYPE, i) * inverse);
            const uint32_t low = code_of(load_value(w, DTYPE, i + 1) * inverse);
            codes[i / 2] = uint8_t(high << 4 | low);
        }
    }
}

// The block's 16 possible values are rounded once and then copied.
template <class Stored>
void dequantize_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                       const float* codebook, void* out, int dtype) {
    for (int64_t block = 0; block < blocks; ++block) {
        Stored table[16];
        for (int i = 0; i < 16; ++i) store_value(table, dtype, i, codebook[i] * absmax[block]);
        const int64_t start = block * block_size;
        Stored* target = static_cast<Stored*>(out) + start;
        for (int64_t i = 0; i < block_size; i += 2) {
            const uint8_t byte = codes[(start + i) / 2];
            target[i] = table[byte >> 4];
            target[i + 1] = table[byte & 15];
        }
    }
}

}  // namespace

namespace scalar {

void quantize(const void* w, int dtype, int64_t blocks, int64_t block_size, const Search& search,
              uint8_t* codes, float* absmax) {
    if (dtype == FP32) quantize_blocks<FP32>(w, blocks, block_size, search, codes, absmax);
    if (dtype == BF16) quantize_blocks<BF16>(w, blocks, block_size, search, codes, absmax);
    if (dtype == FP16) quantize_blocks<FP16>(w, blocks, block_size, search, codes, absmax);
}

void dequantize(const uint8_t* codes, const float* absmax, int64_t blocks, int64_t block_size,
                const float* codebook, void* out, int dtype, bool) {
    if (dtype == FP32)
        dequantize_blocks<float>(codes, absmax, blocks, block_size, codebook, out, dtype);
    else
        dequantize_blocks<uint16_t>(codes, absmax, blocks, block_size, codebook, out, dtype);
}

bool has_nonfinite(const void* w, int dtype, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) {
        if (dtype == FP32) {
            found |= (static_cast<const uint32_t*>(w)[i] & 0x7f800000u) == 0x7f800000u;
        } else {
            const uint16_t exponent = dtype == BF16 ? 0x7f80u : 0x7c00u;
            found |= (static_cast<const uint16_t*>(w)[i] & exponent) == exponent;
        }
    }
    return found;
}

void restore(const uint8_t* codes8, int64_t count, const float* map, float scale, float offset,
             float* absmax) {
    // Multiplied and added in two roundings, as the reference does.
    for (int64_t i = 0; i < count; ++i) absmax[i] = map[codes8[i]] * scale + offset;
}

}  // namespace scalar
