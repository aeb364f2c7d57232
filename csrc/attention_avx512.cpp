// Attention with AVX-512: fp32 operands.
#include <immintrin.h>

#include "attention_math.h"

namespace {

struct Avx512 {
    static constexpr int WIDTH = 16, VECTORS = 4, COLUMNS = 64, ROWS = 4;
    using Vector = __m512;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
    static Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
    static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const AttentionKernels avx512::attention = AttentionExport<WideMath<Avx512>>::kernels;
