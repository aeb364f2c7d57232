// The many-row product of bf16 with AVX-512 BF16: vdpbf16ps multiplies both values of a word and adds them.
// Subnormal values count as zero, as in the few-row product and in oneDNN.
#include "product_bf16.h"

namespace {

struct Bf16 : Lanes512 {
    static __m512i words(const uint32_t* at) { return _mm512_loadu_si512(at); }
    static __m512i everywhere(uint32_t word) { return _mm512_set1_epi32(int(word)); }
    static __m512 add_products(__m512 sum, __m512i x, __m512i w) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }
};

}  // namespace

namespace avx512bf16 {

const ProductKernels product = {
    Bf16::ROWS, 2 * Bf16::LANES, TILES_BYTES, 1, 1, tile_height<Bf16>, transpose_lines, pack_words<transpose_lines>, columns,
    interleave, avx512::kept, add_kept_lanes, multiply_words<Bf16>, store_row, nullptr};

}  // namespace avx512bf16
