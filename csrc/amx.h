// AMX: eight tiles of 16 rows of 64 bytes; tdpbf16ps adds to a tile of fp32 the product of two tiles of bf16, the
// right one packed by pairs of rows (Intel SDM, volume 1, "Programming with Intel AMX").
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_WORDS = 16, TILE_BYTES = 64;

struct alignas(64) TileLayout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The thread's tiles, whole, as long as this lives. oneDNN looks at their layout before it uses them.
class Tiles {
  public:
    Tiles() {
        static constexpr TileLayout layout;
        _tile_loadconfig(&layout);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tiles 0 to 3 hold sums [16 HALVES][32], rows `stride` bytes apart in memory.
template <int HALVES>
void read_sums(const float* sums, int64_t stride, bool add) {
    if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + TILE_WORDS, stride);
    if constexpr (HALVES == 2) {
        const float* below = sums + TILE_ROWS * stride / 4;
        _tile_loadd(2, below, stride);
        _tile_loadd(3, below + TILE_WORDS, stride);
    }
}

template <int HALVES>
void write_sums(float* sums, int64_t stride) {
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + TILE_WORDS, stride);
    if constexpr (HALVES == 2) {
        float* below = sums + TILE_ROWS * stride / 4;
        _tile_stored(2, below, stride);
        _tile_stored(3, below + TILE_WORDS, stride);
    }
}

// The sums += rows [16 HALVES][16 words] times right [16][32 words].
template <int HALVES>
void add_product(const void* rows, int64_t row_bytes, const void* right, int64_t right_bytes) {
    _tile_loadd(6, right, right_bytes);
    _tile_loadd(7, static_cast<const char*>(right) + TILE_BYTES, right_bytes);
    _tile_loadd(4, rows, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (HALVES == 2) {
        _tile_loadd(5, static_cast<const char*>(rows) + TILE_ROWS * row_bytes, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

}  // namespace
