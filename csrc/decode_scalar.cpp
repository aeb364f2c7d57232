// What stands between the products of a decoded token, compiled for the oldest processor of the architecture.
#include "decode.h"

FB_DECODE(scalar)
