// RMS norm and gated activations, compiled for AVX-512.
#include "elementwise.h"

FB_ELEMENTWISE(avx512)
