// Vectors of as many floats as one register of the instruction set this file is compiled for.
//
// Arithmetic is GCC's (and clang's) vector extension; only what that cannot say is an intrinsic. Everything has
// internal linkage: the same names exist once per instruction set in one library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 4)));
typedef int64_t Longs __attribute__((vector_size(LANES * 4)));

inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Words load_words(const void* p) {
    Words v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline Floats splat(float x) { return Floats{} + x; }

inline Words splat_word(const void* p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return Words{} + word;
}

inline Floats as_floats(Words v) { return (Floats)v; }

// a * b + c, rounded once where the CPU can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The second operand where either is NaN.
inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// The lanes of v, each `distance` (a power of two) away from where it was.
inline Floats swap_lanes(Floats v, int distance) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i ^ distance;
    return __builtin_shuffle(v, lane);
}

// The sum of all lanes, in an order that depends on LANES alone.
inline float sum(Floats v) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) v += swap_lanes(v, distance);
    return v[0];
}

inline float largest(Floats v) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) v = max(v, swap_lanes(v, distance));
    return v[0];
}

// The largest magnitude as bits: ordered as the numbers are, infinity above them, NaN above all.
inline uint32_t largest_magnitude(const float* x, int count) {
    Words best = {};
    for (int k = 0; k < count; k += LANES) {
        Words bits = load_words(x + k) & 0x7fffffffu;
        best = bits > best ? bits : best;
    }
    uint32_t lanes[LANES], result = 0;
    memcpy(lanes, &best, sizeof best);
    for (uint32_t lane : lanes) result = lane > result ? lane : result;
    return result;
}

inline Ints round_to_int(Floats v) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtps_epi32(v);
#elif defined(__SSE2__)
    return (Ints)_mm_cvtps_epi32(v);
#else
    return __builtin_convertvector(v + (v < 0 ? splat(-0.5f) : splat(0.5f)), Ints);
#endif
}

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// e^x to 2 units in the last place: 0 below -87, NaN stays NaN. Range reduction by ln 2 in two parts, then a
// polynomial of degree 6 (the coefficients are 1/n!, nudged to a minimax fit on [-ln2/2, ln2/2]).
inline Floats exp(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats bounded = max(splat(-87.0f), min(splat(88.0f), x));
    Floats shifted = fma(bounded, splat(1.44269504f), magic);
    Floats n = shifted - magic;
    Floats r = fma(n, splat(-0.693145752f), bounded);
    r = fma(n, splat(-1.42860677e-6f), r);
    Floats p = splat(1.3981999e-3f);
    p = fma(p, r, splat(8.3334519e-3f));
    p = fma(p, r, splat(4.1665796e-2f));
    p = fma(p, r, splat(1.6666667e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
    Floats result = p * (Floats)exponent;
    return x < splat(-87.0f) ? Floats{} : result;
}

// bf16 pairs: the low half of each word is the first number, the high half the second.
inline Floats low_bf16(Words pairs) { return as_floats(pairs << 16); }
inline Floats high_bf16(Words pairs) { return as_floats(pairs & 0xffff0000u); }

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // NaN stays NaN
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Round `count` floats (a multiple of LANES) to bf16, to nearest even.
inline void to_bf16(const float* x, uint16_t* y, int count) {
#if defined(__AVX512BF16__)
    for (int k = 0; k < count; k += LANES) {
        __m256bh halves = _mm512_cvtneps_pbh(load(x + k));
        memcpy(y + k, &halves, sizeof halves);
    }
#else
    for (int k = 0; k < count; k++) y[k] = to_bf16(x[k]);
#endif
}

}  // namespace
