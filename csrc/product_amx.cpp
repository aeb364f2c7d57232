// The many-row product of bf16 with AMX: a tile of 32 rows by a panel of 32 lanes is four tiles of sums. The words of
// a tile lie as [words / 16][height][16], each piece a tile of the processor. Subnormal values count as zero.
#include "amx.h"
#include "product_bf16.h"

namespace {

// Half of the second cache: from the last one tiles come at half the speed that they are multiplied with.
constexpr int64_t TILES_IN_CACHE = 1 << 20;
constexpr int64_t ROWS = 2 * TILE_ROWS, LANES = 2 * TILE_WORDS;

int64_t height(int64_t rows) { return rows > TILE_ROWS ? ROWS : TILE_ROWS; }

void pack(const char* lines, int64_t bytes, int64_t n, int64_t words, int64_t height, uint32_t* tile) {
    for (int64_t w = 0; w < words; w += TILE_WORDS) {
        const int64_t left = bytes - 4 * w;
        const __mmask64 inside = left >= TILE_BYTES ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        for (int64_t r = 0; r < height; ++r, tile += TILE_WORDS)
            _mm512_storeu_si512(tile, r < n ? _mm512_maskz_loadu_epi8(inside, lines + r * bytes + 4 * w)
                                            : _mm512_setzero_si512());
    }
}

template <int HALVES>
void multiply_tile(const uint32_t* tile, const uint32_t* panel, int64_t count, bool add, float* sums) {
    constexpr int64_t STRIDE = LANES * sizeof(float);
    read_sums<HALVES>(sums, STRIDE, add);
    for (int64_t w = 0; w < count; w += TILE_WORDS)
        add_product<HALVES>(tile + HALVES * TILE_ROWS * w, TILE_BYTES, panel + LANES * w, STRIDE);
    write_sums<HALVES>(sums, STRIDE);
}

void multiply(const uint32_t* tiles, int64_t rows, int64_t words, int64_t start, int64_t count, const uint32_t* panel,
              bool add, float* sums) {
    const Tiles configured;
    for (int64_t row = 0; row < rows; row += ROWS) {
        const uint32_t* tile = tiles + row * words;
        if (rows - row > TILE_ROWS)
            multiply_tile<2>(tile + ROWS * start, panel, count, add, sums + row * LANES);
        else
            multiply_tile<1>(tile + TILE_ROWS * start, panel, count, add, sums + row * LANES);
    }
}

void stream_rows(const float* sums, const float* bias, int64_t rows, int64_t width, void* out, int64_t bytes) {
    const auto half = [&](int64_t i) {
        return _mm512_cvtepi32_epi16(round_to_bf16(_mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(bias + i))));
    };
    for (int64_t row = 0; row < rows; ++row, sums += LANES) {
        char* to = static_cast<char*>(out) + row * bytes;
        if (width < LANES || uintptr_t(to) % 64 != 0)
            store_row(sums, bias, width, to);
        else
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                                _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(16), 1));
    }
    _mm_sfence();
}

}  // namespace

namespace amx {

const ProductKernels product = {ROWS, LANES, TILES_IN_CACHE, MOST_TOGETHER, TILE_WORDS, height, transpose_lines, pack, columns,
                                interleave, avx512::kept, add_kept_lanes, multiply, store_row, stream_rows};

}  // namespace amx
