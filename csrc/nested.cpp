// Double quantization: the block scales of a tensor, quantized again to 8 bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dynamic.h"
#include "fourbit.h"
#include "parallel.h"
#include "scales.h"

namespace {

// Values summed by one halving tree, and scales per task.
constexpr int64_t SUM_CHUNK = 4096, TASK_SCALES = 1 << 14;

// values[0] + ... by adding the second half to the first until one value is left; missing values
// count as zero. `count` is 1 to SUM_CHUNK.
template <class Value>
double sum_chunk(const Value* values, int64_t count) {
    double sums[SUM_CHUNK];
    for (int64_t i = 0; i < SUM_CHUNK; ++i) sums[i] = i < count ? double(values[i]) : 0.0;
    for (int64_t half = SUM_CHUNK / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
}

template <class Value>
std::vector<double> chunk_sums(const Value* values, int64_t count, int threads) {
    std::vector<double> sums(size_t(ceil_div(count, SUM_CHUNK)));
    parallel_for(int64_t(sums.size()), threads, [&](int64_t chunk) {
        const int64_t start = chunk * SUM_CHUNK;
        sums[size_t(chunk)] = sum_chunk(values + start, std::min(SUM_CHUNK, count - start));
    });
    return sums;
}

// The order is part of the format's exactness: it must not depend on threads or device. The chunk
// sums are the values of the next round.
double sum(const float* values, int64_t count, int threads) {
    if (count == 0) return 0.0;
    std::vector<double> sums = chunk_sums(values, count, threads);
    while (sums.size() > 1) sums = chunk_sums(sums.data(), int64_t(sums.size()), threads);
    return sums[0];
}

}  // namespace

int fb_quantize_absmax(const float* absmax, int64_t b, const float* thresholds, uint8_t* codes8,
                       float* nested_absmax, float* offset, int threads) {
    if (b < 0) return 1;
    const float mean = float(sum(absmax, b, threads) / double(std::max<int64_t>(1, b)));
    *offset = mean;
    parallel_for(ceil_div(b, NESTED_BLOCK_SIZE), threads, [&](int64_t block) {
        const int64_t start = block * NESTED_BLOCK_SIZE, end = std::min(b, start + NESTED_BLOCK_SIZE);
        float largest = 0.0f;
        for (int64_t i = start; i < end; ++i) largest = std::max(largest, std::fabs(absmax[i] - mean));
        nested_absmax[block] = largest;
        const float scale = std::max(largest, 1e-38f);
        float y[NESTED_BLOCK_SIZE];
        for (int64_t i = start; i < end; ++i) y[i - start] = (absmax[i] - mean) / scale;
        find_codes(y, end - start, thresholds, codes8 + start);
    });
    return 0;
}

int fb_dequantize_absmax(const uint8_t* codes8, const float* nested_absmax, const float* offset,
                         const float* map, int64_t b, float* absmax, int threads) {
    if (b < 0) return 1;
    const Scales scales{codes8, nested_absmax, offset, map};
    parallel_for(ceil_div(b, TASK_SCALES), threads, [&](int64_t task) {
        const int64_t start = task * TASK_SCALES;
        scales.run(start, std::min(TASK_SCALES, b - start), absmax + start);
    });
    return 0;
}
