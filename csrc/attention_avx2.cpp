// Attention with AVX2: fp32 operands.
#include <immintrin.h>

#include "attention_math.h"

namespace {

struct Avx2 {
    static constexpr int WIDTH = 8, VECTORS = 2, COLUMNS = 16, ROWS = 4;
    using Vector = __m256;
    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
    static Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const AttentionKernels avx2::attention = AttentionExport<WideMath<Avx2>>::kernels;
