// Elements of a network's signals and weights, fp32 or bf16, and how words of 32 bits of them are multiplied.

#pragma once

#include "gemm.h"

namespace fastsde {

static inline void store_as(float* to, Floats v) { store(to, v); }

static inline Floats load_as(const float* from) { return load(from); }

// The products of words of elements, and how many elements have a word.
template <class T>
struct KindOf {
    using Type = Single;
    static constexpr int64_t PER_WORD = 1;
};

#if defined(FASTSDE_BF16)
typedef uint16_t Half;  // bf16

static inline void store_as(Half* to, Floats v) {
    const __m256bh narrow = _mm512_cvtneps_pbh(v);
    std::memcpy(to, &narrow, sizeof(narrow));
}

static inline Floats load_as(const Half* from) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves v;
    std::memcpy(&v, from, sizeof(v));
    return bits_of<Floats>(__builtin_convertvector(v, Words) << 16);
}

// Stores two vectors as pairs of their elements.
static inline void store_pairs(float* to, Floats even, Floats odd) {
    const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);  // even's elements first
    const __m256i low = _mm512_castsi512_si256((__m512i)both), high = _mm512_extracti64x4_epi64((__m512i)both, 1);
    const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted);
    std::memcpy(to, &words, sizeof(words));
}

template <>
struct KindOf<Half> {
    using Type = Pairs;
    static constexpr int64_t PER_WORD = 2;
};
#endif

}  // namespace fastsde
