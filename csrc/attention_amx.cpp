// Attention with AMX: products of up to 32 x 32 at a time in four tiles of sums.
#include "amx.h"
#include "attention_bf16.h"

namespace {

struct AmxMath : Bf16Passes {
    using Scope = Tiles;
    static constexpr int64_t WIDTH_STEP = 2 * TILE_WORDS;

    // c [m, n] (+)= a [m, k] b [k, n]; all of them multiples of 32.
    static void multiply(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        for (int64_t i = 0; i < m; i += 2 * TILE_ROWS)
            for (int64_t j = 0; j < n; j += 2 * TILE_WORDS) block(a + i * k, k, b + 2 * j, n, c + i * n + j, add);
    }

    static void block(const uint16_t* a, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        const int64_t stride = 4 * n;  // of c, and of b's pairs
        read_sums<2>(c, stride, add);
        for (int64_t kk = 0; kk < k; kk += 2 * TILE_WORDS) add_product<2>(a + kk, 2 * k, b + kk * n, stride);
        write_sums<2>(c, stride);
    }
};

}  // namespace

const AttentionKernels amx::attention = AttentionExport<AmxMath>::kernels;
