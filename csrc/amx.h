// AMX: eight tiles of 16 rows of 64 bytes; tdpbf16ps adds to a tile of fp32 the product of two tiles of bf16, the
// right one packed by pairs of rows (Intel SDM, volume 1, chapter 19).
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

}  // namespace
