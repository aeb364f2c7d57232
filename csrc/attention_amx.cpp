// Attention with AMX: products of up to 32 x 32 at a time in four tiles of sums.
#include "amx.h"
#include "attention_bf16.h"

namespace {

struct AmxMath : Bf16Passes {
    using Scope = Tiles;
    static constexpr int64_t WIDTH_STEP = 2 * TILE_WORDS;

    // c [m, n] (+)= a [m, k] b [k, n]; m and k are multiples of 32, n of 32.
    static void multiply(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        for (int64_t i = 0; i < m; i += 2 * TILE_ROWS)
            for (int64_t j = 0; j < n; j += 2 * TILE_WORDS) block(a + i * k, k, b + 2 * j, n, c + i * n + j, add);
    }

    static void block(const uint16_t* a, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        const int64_t row = 2 * k, words = 4 * n;
        float* below = c + TILE_ROWS * n;
        if (add) {
            _tile_loadd(0, c, words);
            _tile_loadd(1, c + TILE_WORDS, words);
            _tile_loadd(2, below, words);
            _tile_loadd(3, below + TILE_WORDS, words);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t kk = 0; kk < k; kk += 2 * TILE_WORDS) {
            _tile_loadd(4, a + kk, row);
            _tile_loadd(6, b + kk * n, words);
            _tile_loadd(7, b + kk * n + 2 * TILE_WORDS, words);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + TILE_ROWS * k + kk, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, words);
        _tile_stored(1, c + TILE_WORDS, words);
        _tile_stored(2, below, words);
        _tile_stored(3, below + TILE_WORDS, words);
    }
};

}  // namespace

const AttentionKernels amx::attention = AttentionExport<AmxMath>::kernels;
