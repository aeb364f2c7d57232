// What stands between the products of a decoded token, compiled for AVX2.
#include "decode.h"

FB_DECODE(avx2)
