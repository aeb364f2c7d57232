// Decoding of any stretch of a 4-bit tensor, shared by codec.cpp and linear.cpp.
#pragma once

#include <cstdint>

// Writes values start .. start + count to out[0 .. count), `dtype`; absmax[0] is the scale of the
// block that holds `start`. Bounds need not meet blocks or bytes.
void dequantize_span(const uint8_t* codes, const float* absmax, int64_t start, int64_t count,
                     int64_t block_size, const float* codebook, void* out, int dtype, bool stream);
