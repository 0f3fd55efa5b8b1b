// Vectors of floats as wide as the CPU's, by the vector extensions of GCC and Clang, and functions of them.
//
// A few operations that the extensions lack are written for x86 and, lane by lane, for everything else. Polynomials are
// minimax fits; the stated errors are those of the coefficients in exact arithmetic.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define FASTSDE_AVX512 1
#if defined(__AVX512BF16__)
#define FASTSDE_BF16 1
#endif
#elif defined(__AVX2__)
#define FASTSDE_AVX2 1
#elif defined(__SSE2__)
#define FASTSDE_SSE2 1
#endif

namespace fastsde {

#if defined(FASTSDE_AVX512)
constexpr int LANES = 16;
#elif defined(FASTSDE_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));  // LANES / 2 of them

template <class To, class From>
static inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

static inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

static inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof(v)); }

// Runs body(first, here) for runs of up to LANES out of ``count``; ``here`` is the length of the run.
template <class Body>
static inline void for_lanes(int64_t count, Body body) {
    int64_t first = 0;
    for (; first + LANES <= count; first += LANES) body(first, (int64_t)LANES);
    if (first < count) body(first, count - first);
}

// Loads the first ``here`` lanes, followed by zeros.
static inline Floats load(const float* from, int64_t here) {
    if (here == LANES) return load(from);
    Floats v{};
    std::memcpy(&v, from, here * sizeof(float));
    return v;
}

static inline void store(float* to, Floats v, int64_t here) { std::memcpy(to, &v, here * sizeof(float)); }

static inline bool any_nan(Floats v) {
    for (int i = 0; i < LANES; i++)
        if (v[i] != v[i]) return true;
    return false;
}

// Returns whether any lane of a comparison holds.
static inline bool any(Ints lanes) {
#if defined(FASTSDE_AVX512)
    return _mm512_movepi32_mask((__m512i)lanes) != 0;
#elif defined(FASTSDE_AVX2)
    return _mm256_movemask_ps((__m256)lanes) != 0;
#elif defined(FASTSDE_SSE2)
    return _mm_movemask_ps((__m128)lanes) != 0;
#else
    for (int i = 0; i < LANES; i++)
        if (lanes[i]) return true;
    return false;
#endif
}

// Returns the sum of all lanes, adding halves to halves.
static inline float sum_of(Floats v) {
#if defined(__x86_64__)
#if defined(FASTSDE_AVX512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(FASTSDE_AVX2)
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
    const __m128 quarter = v;
#endif
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
#else
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

// Keeps the compiler from fusing a product with an addition where the contract is two roundings.
static inline Floats rounded(Floats x) {
    asm volatile("" : "+m"(x));
    return x;
}

static inline Floats all(float x) { return x - Floats{}; }

// Both return NaN for a NaN in x.
static inline Floats at_least(Floats x, float low) {
#if defined(FASTSDE_AVX512)
    return _mm512_max_ps(all(low), x);  // the second one if either is NaN
#elif defined(FASTSDE_AVX2)
    return _mm256_max_ps(all(low), x);
#else
    return all(low) > x ? all(low) : x;
#endif
}

static inline Floats at_most(Floats x, float high) {
#if defined(FASTSDE_AVX512)
    return _mm512_min_ps(all(high), x);
#elif defined(FASTSDE_AVX2)
    return _mm256_min_ps(all(high), x);
#else
    return all(high) < x ? all(high) : x;
#endif
}

constexpr int32_t SIGN = INT32_MIN;  // the bit

static inline Floats absolute(Floats x) { return bits_of<Floats>(bits_of<Ints>(x) & ~SIGN); }

// -|x|.
static inline Floats minus_absolute(Floats x) { return bits_of<Floats>(bits_of<Ints>(x) | SIGN); }

// An odd function of x, from its value at |x|.
static inline Floats odd(Floats at_absolute, Floats x) {
    return bits_of<Floats>(bits_of<Ints>(at_absolute) ^ (bits_of<Ints>(x) & SIGN));
}

// Rounds to the nearest integer, for |x| < 2^22.
static inline Floats nearest(Floats x) {
#if defined(FASTSDE_AVX512)
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTSDE_AVX2)
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23, whose last bit is 1
    return (x + magic) - magic;
#endif
}

static inline Floats square_root(Floats x) {
#if defined(FASTSDE_AVX512)
    return _mm512_sqrt_ps(x);
#elif defined(FASTSDE_AVX2)
    return _mm256_sqrt_ps(x);
#elif defined(FASTSDE_SSE2)
    return _mm_sqrt_ps(x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Returns the 64-bit products of the low 32 bits of a with b.
static inline Longs multiply_low(Longs a, uint32_t b) {
#if defined(FASTSDE_AVX512)
    return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(FASTSDE_AVX2)
    return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(FASTSDE_SSE2)
    return (Longs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xFFFFFFFFull) * (uint64_t)b;
#endif
}

// The low (or high) pair of a and b in every 128 bits, as 64-bit elements: a0 b0 | a2 b2 ... (or a1 b1 | a3 b3 ...).
static inline Longs interleave_even(Longs a, Longs b) {
#if defined(FASTSDE_AVX512)
    return (Longs)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(FASTSDE_AVX2)
    return (Longs)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
    return Longs{a[0], b[0]};
#endif
}

static inline Longs interleave_odd(Longs a, Longs b) {
#if defined(FASTSDE_AVX512)
    return (Longs)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(FASTSDE_AVX2)
    return (Longs)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    return Longs{a[1], b[1]};
#endif
}

static inline Floats polynomial(Floats, float last) { return all(last); }

// first + x (next + x (...)).
template <class... Rest>
static inline Floats polynomial(Floats x, float first, Rest... rest) {
    return polynomial(x, rest...) * x + first;
}

// 2^x to 1e-7, for x in [-126, 0].
static inline Floats exp2_bounded(Floats x) {
    const Floats whole = nearest(x);
    const Floats fraction = x - whole;
    const Floats mantissa = polynomial(fraction, 1.00000007f, 0.693146967f, 0.240221197f, 0.0555071327f,
                                       0.00967554133f, 0.00132764718f);
#if defined(FASTSDE_AVX512)
    return _mm512_scalef_ps(mantissa, whole);
#else
    // NaN cannot be converted to an integer, but the mantissa is NaN, too, and so is the product.
    const Ints exponent = __builtin_convertvector(whole == whole ? whole : Floats{}, Ints);
    return mantissa * bits_of<Floats>((exponent + 127) << 23);
#endif
}

// 2^x to 1e-7, for x up to 0; never below 2^-126.
static inline Floats exp2_negative(Floats x) { return exp2_bounded(at_least(x, -126.0f)); }

// e^x to 1e-7; never above 2^127.
static inline Floats exp(Floats x) {
    x = at_most(x * 1.44269504f, 127.0f);
    return x > 0.0f ? 1.0f / exp2_negative(-x) : exp2_negative(x);
}

// ln x to 1e-7, for normal x.
static inline Floats log(Floats x) {
    // The exponent is counted from sqrt(1/2), so that the mantissa is in [sqrt(1/2), sqrt(2)).
    const Ints offset = bits_of<Ints>(x) - 0x3F3504F3;
    const Ints exponent = offset >> 23;
    const Floats f = bits_of<Floats>((offset & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    const Floats tail = polynomial(f, 0.333333317f, -0.25000821f, 0.200012269f, -0.166233573f, 0.14201758f,
                                   -0.131601824f, 0.12761577f, -0.0763449653f);
    const Floats series = f - f * f * (0.5f - f * tail);
    return __builtin_convertvector(exponent, Floats) * 0.693147181f + series;
}

// ln(1 + x) for x in [0, 1], to 1e-7.
static inline Floats log1p(Floats x) {
    return x * polynomial(x, 0.999999328f, -0.499970943f, 0.332896681f, -0.246726879f, 0.185698189f, -0.126908895f,
                          0.0680847117f, -0.0238554681f, 0.00393046022f);
}

// The sine and the cosine of an angle in a quadrant, from those of its distance to the quadrant's middle.
static inline void place_quarter(Ints quadrant, Floats s, Floats c, Floats& sine, Floats& cosine) {
    const Ints odd_one = quadrant & 1;
    const Ints sine_sign = (quadrant << 30) & SIGN, cosine_sign = ((quadrant + 1) << 30) & SIGN;
    sine = bits_of<Floats>(bits_of<Ints>(odd_one == 0 ? s : c) ^ sine_sign);
    cosine = bits_of<Floats>(bits_of<Ints>(odd_one == 0 ? c : s) ^ cosine_sign);
}

// sin and cos of 2 pi turns, for turns in [0, 1], to 1e-7.
static inline void sin_cos_turns(Floats turns, Floats& sine, Floats& cosine) {
    const Floats quarters = turns * 4.0f;
    const Floats whole = nearest(quarters);
    const Floats r = quarters - whole;  // exact
    const Floats square = r * r;
    const Floats s = r * polynomial(square, 1.57079631f, -0.645962938f, 0.079675903f, -0.00459228907f);
    const Floats c = polynomial(square, 1.0f, -1.23370054f, 0.253669204f, -0.0208600713f, 0.000903631702f);
    place_quarter(__builtin_convertvector(whole, Ints), s, c, sine, cosine);
}

// sin x and cos x to 1e-7 (absolute), for any x.
static inline void sin_cos(Floats x, Floats& sine, Floats& cosine) {
    const Floats size = absolute(x);
    if (any(~(size <= 8192.0f))) {  // beyond, the quarter turns are not subtracted exactly
        for (int i = 0; i < LANES; i++) sine[i] = std::sin(x[i]), cosine[i] = std::cos(x[i]);
        return;
    }
    const Floats whole = nearest(x * 0.636619772f);
    // A quarter turn in three parts, of which the first two have few bits (Cody & Waite 1980).
    const Floats r = ((x - whole * 1.5703125f) - whole * 4.837512969970703125e-4f) - whole * 7.5497899548918821e-8f;
    const Floats square = r * r;
    const Floats s = r + r * square * polynomial(square, -0.166666508f, 0.00833201688f, -0.000195018220f);
    const Floats c = polynomial(square, 1.0f, -0.5f, 0.0416666232f, -0.00138867635f, 2.43904506e-5f);
    place_quarter(__builtin_convertvector(whole, Ints), s, c, sine, cosine);
}

// erf x to 1e-7: for |x| up to 4.2, 1 - erf |x| is 2^-(|x| Q(|x|)) with a polynomial Q.
static inline Floats erf(Floats x) {
    const Floats size = at_most(absolute(x), 4.2f);
    const Floats q = polynomial(size, 1.62790727f, 0.918442901f, 0.148307911f, -0.027724477f, -8.48036246e-05f,
                                0.00227478386f, -0.000848233462f, 0.000152964103f, -1.1604781e-05f);
    return odd(1.0f - exp2_negative(-size * q), x);
}

// The share of a standard normal beyond x, (1 - erf(x / sqrt 2)) / 2, to 1e-7, for x from 0 to TAIL_END, from where on
// it is as good as 0: as `erf`, with its factors in Q.
constexpr float TAIL_END = 5.93f;
static inline Floats normal_tail(Floats x) {
    const Floats q = polynomial(x, 1.15110427f, 0.459221451f, 0.0524347648f, -0.00693111925f,
                                -1.49913045e-05f, 0.000284347983f, -7.49739541e-05f,
                                9.56025644e-06f, -5.12863709e-07f);
    return exp2_bounded(-x * q - 1.0f);
}

}  // namespace fastsde
