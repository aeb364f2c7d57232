// Attention with AVX-512 BF16: vdpbf16ps multiplies pairs and adds them in fp32.
#include "attention_bf16.h"

namespace {

struct Bf16Math : Bf16Passes, OneScope {
    static constexpr int64_t WIDTH_STEP = 16, PART = 64;
    static constexpr int64_t FORWARD_QUERIES = 64, BACKWARD_QUERIES = 64;

    // Columns part PART to part PART + PART of c [m, n] (+)= a [m, k] b [k, n]; m and n are multiples of 16.
    static void product(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, int64_t part, float* c,
                        bool add) {
        int64_t j = part * PART;
        if (j + PART <= n) return columns<4>(a, m, k, b + 2 * j, n, c + j, add);
        for (; j < n; j += 16) columns<1>(a, m, k, b + 2 * j, n, c + j, add);
    }

    template <int VECTORS>
    static void columns(const uint16_t* a, int64_t m, int64_t k, const uint16_t* b, int64_t n, float* c, bool add) {
        constexpr int ROWS = VECTORS == 4 ? 4 : 8;
        for (int64_t i = 0; i < m; i += ROWS) {
            __m512 sums[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v)
                    sums[r][v] = add ? _mm512_loadu_ps(c + (i + r) * n + 16 * v) : _mm512_setzero_ps();
            for (int64_t kk = 0; kk < k; kk += 2) {
                __m512bh line[VECTORS];
                for (int v = 0; v < VECTORS; ++v) line[v] = as_bf16(_mm512_loadu_si512(b + kk * n + 32 * v));
                for (int r = 0; r < ROWS; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, a + (i + r) * k + kk, 4);
                    const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
                    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, line[v]);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + (i + r) * n + 16 * v, sums[r][v]);
        }
    }
};

}  // namespace

const AttentionKernels avx512bf16::attention = AttentionExport<Bf16Math>::kernels;
