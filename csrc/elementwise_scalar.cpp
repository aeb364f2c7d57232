// RMS norm, gated activations and cross-entropy, compiled for the oldest processor of the architecture.
#include "elementwise.h"

FB_ELEMENTWISE(scalar)
