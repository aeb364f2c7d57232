// Keyed dropout: the split over threads.
#include <algorithm>

#include "convert.h"
#include "fourbit.h"
#include "kernels.h"
#include "parallel.h"

int fb_dropout(const void* x, int dtype, int64_t T, int64_t K, const int64_t* row, const int64_t* position,
               int64_t layer, int64_t seed, int64_t step, double p, void* y, int threads) {
    if (!known_dtype(dtype) || T < 0 || K < 0 || !(p >= 0.0 && p * 65536.0 + 0.5 < 65536.0)) return 1;
    const uint32_t threshold = uint32_t(p * 65536.0 + 0.5);
    const int64_t row_bytes = K * dtype_bytes(dtype);
    const float scale = 65536.0f / float(65536 - threshold);
    const uint32_t key = uint32_t(uint64_t(seed)) ^ uint32_t(uint64_t(seed) >> 32);
    const int64_t per_task = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, K));
    parallel_for(ceil_div(T, per_task), threads, [&](int64_t task) {
        for (int64_t t = task * per_task; t < std::min(T, (task + 1) * per_task); ++t)
            kernels().dropout({static_cast<const char*>(x) + t * row_bytes,
                               static_cast<char*>(y) + t * row_bytes,
                               dtype,
                               K,
                               uint32_t(row[t]),
                               uint32_t(position[t]),
                               uint32_t(layer),
                               {key, uint32_t(step)},
                               threshold,
                               scale});
    });
    return 0;
}
