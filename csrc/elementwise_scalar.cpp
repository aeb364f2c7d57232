// RMS norm and gated activations, compiled for the oldest processor of the architecture.
#include "elementwise.h"

FB_ELEMENTWISE(scalar)
