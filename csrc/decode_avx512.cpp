// What stands between the products of a decoded token, compiled for AVX-512.
#include "decode.h"

FB_DECODE(avx512)
