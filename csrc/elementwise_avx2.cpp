// RMS norm and gated activations, compiled for AVX2.
#include "elementwise.h"

FB_ELEMENTWISE(avx2)
