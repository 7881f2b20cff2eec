// IEEE half precision on a CPU, by its bits; see cuda_runtime.h beside this.
#pragma once

#include "cuda_runtime.h"

struct __half {
    unsigned short bits;
};

inline float __half2float(__half x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float magnitude = exponent ? std::ldexp(float(fraction | 1024u), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
    const unsigned short sign = __float_as_uint(x) >> 16 & 0x8000u;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return {static_cast<unsigned short>(sign | 0x7fffu)};
    if (magnitude >= 65520.f) return {static_cast<unsigned short>(sign | 0x7c00u)};  // rounds past the largest number
    // Steps of 2^-24 below 2^-14, of 2^(e - 10) at 2^e; nearbyint rounds to nearest, ties to even.
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const unsigned steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    const unsigned bits = magnitude < 0x1p-14f ? steps : (static_cast<unsigned>(exponent + 15) << 10) + steps - 1024;
    return {static_cast<unsigned short>(sign | bits)};
}
