// RMS norm, gated activations and cross-entropy, compiled for AVX-512.
#include "elementwise.h"

FB_ELEMENTWISE(avx512)
