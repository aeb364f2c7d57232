// Attention with AMX: products of up to 32 x 32 at a time in four tiles of sums.
#include "amx.h"
#include "attention_bf16.h"

namespace {

struct AmxMath : Bf16Passes {
    using Scope = Tiles;
    static constexpr int64_t WIDTH_STEP = 2 * TILE_WORDS, PART = 4 * TILE_WORDS;
    // Forward, all that two strips of 16 meet stays in a first cache of 48 KB; backward, sums for dK and dV come from the
    // second once for all queries.
    static constexpr int64_t FORWARD_QUERIES = 2 * TILE_ROWS, BACKWARD_QUERIES = 128;

    // Columns part PART to part PART + PART of c [m, n] (+)= a [m, k] b [k, n]; k and n are multiples of 32, m is 16 or
    // one too.
    static void product(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, int64_t part, float* c,
                        bool add) {
        int64_t j = part * PART;
        const int64_t end = std::min(n, j + PART);
        if (m == TILE_ROWS && j + PART == end) return row_of_tiles(a, k, b + 2 * j, n, c + j, add);
        for (; j < end; j += 2 * TILE_WORDS)
            for (int64_t i = 0; i < m; i += 2 * TILE_ROWS) {
                if (m == TILE_ROWS)
                    block<1>(a, k, b + 2 * j, n, c + j, add);
                else
                    block<2>(a + i * k, k, b + 2 * j, n, c + i * n + j, add);
            }
    }

    // 16 HALVES rows of 32 columns.
    template <int HALVES>
    static void block(const uint16_t* a, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        const int64_t stride = 4 * n;  // of c, and of b's pairs
        read_sums<HALVES>(c, stride, add);
        for (int64_t kk = 0; kk < k; kk += 2 * TILE_WORDS) add_product<HALVES>(a + kk, 2 * k, b + kk * n, stride);
        write_sums<HALVES>(c, stride);
    }

    // 16 rows of 64 columns.
    static void row_of_tiles(const uint16_t* a, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        const int64_t stride = 4 * n;
        if (add) {
            _tile_loadd(0, c, stride);
            _tile_loadd(1, c + TILE_WORDS, stride);
            _tile_loadd(2, c + 2 * TILE_WORDS, stride);
            _tile_loadd(3, c + 3 * TILE_WORDS, stride);
        } else {
            read_sums<2>(nullptr, 0, false);
        }
        for (int64_t kk = 0; kk < k; kk += 2 * TILE_WORDS) {
            const uint16_t* right = b + kk * n;
            _tile_loadd(4, a + kk, 2 * k);
            _tile_loadd(5, right, stride);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, right + 2 * TILE_WORDS, stride);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, right + 4 * TILE_WORDS, stride);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, right + 6 * TILE_WORDS, stride);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, c, stride);
        _tile_stored(1, c + TILE_WORDS, stride);
        _tile_stored(2, c + 2 * TILE_WORDS, stride);
        _tile_stored(3, c + 3 * TILE_WORDS, stride);
    }
};

}  // namespace

const AttentionKernels amx::attention = AttentionExport<AmxMath>::kernels;
