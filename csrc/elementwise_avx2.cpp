// RMS norm, gated activations and cross-entropy, compiled for AVX2.
#include "elementwise.h"

FB_ELEMENTWISE(avx2)
