// The noise contract (fastsde.noise): Philox4x32-10 and draws from it, for LANES / 2 counters at once.

#pragma once

#include <algorithm>

#include "simd.h"

namespace fastsde {

enum Stream : uint64_t { SAMPLING = 0, TRAINING_NOISE = 1, TRAINING_TIME = 2, DATA_ORDER = 3 };

constexpr int BLOCKS = LANES / 2;  // drawn at once

// Returns what the draw of a step in a stream adds to the offset of a key.
static inline uint64_t draw_offset(uint64_t step, Stream stream) { return (stream << 28 | step) << 32; }

// Four words per counter, in the low halves; the high halves are unspecified.
struct Block {
    Longs w0, w1, w2, w3;
};

static inline Block philox(Longs seed, Longs counter) {
    Block x{counter, counter >> 32, Longs{}, Longs{}};
    Longs key_0 = seed, key_1 = seed >> 32;
    for (int round = 0; round < 10; round++) {
        const Longs product_0 = multiply_low(x.w0, 0xD2511F53u), product_1 = multiply_low(x.w2, 0xCD9E8D57u);
        x = Block{product_1 >> 32 ^ x.w1 ^ key_0, product_1, product_0 >> 32 ^ x.w3 ^ key_1, product_0};
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    return x;
}

// Maps 32-bit words u to u 2^-32 + 2^-33.
static inline Floats unit(Words words) { return __builtin_convertvector(words, Floats) * 0x1p-32f + 0x1p-33f; }

// Computes two normals per 32-bit lane, from its words for radius and angle.
static inline void box_muller(Words radius_words, Words angle_words, Floats& even, Floats& odd) {
    const Floats radius = square_root(log(unit(radius_words)) * -2.0f);
    Floats sine, cosine;
    sin_cos_turns(unit(angle_words), sine, cosine);
    even = radius * cosine;
    odd = radius * sine;
}

// Packs the low halves of a with those of b above them.
static inline Words halves(Longs a, Longs b) { return bits_of<Words>((a & 0xFFFFFFFFull) | b << 32); }

// Draws the normals 4 j to 4 j + 2 LANES - 1 of a key, for j = first_block.
static inline void normals_of(uint64_t seed, uint64_t offset, uint64_t first_block, float* to) {
    Longs block;
    // Even lanes take the first half of the blocks, odd lanes the second, so that each vector of results is contiguous.
    for (int i = 0; i < BLOCKS; i++) block[i] = i / 2 + i % 2 * (BLOCKS / 2);
    const Block x = philox(seed + Longs{}, block + (offset + first_block));
    Floats even, odd;
    box_muller(halves(x.w0, x.w2), halves(x.w1, x.w3), even, odd);
    const Longs e = bits_of<Longs>(even), o = bits_of<Longs>(odd);
    const Longs first = (e & 0xFFFFFFFFull) | o << 32, second = e >> 32 | (o & 0xFFFFFFFF00000000ull);
    store(to, bits_of<Floats>(interleave_even(first, second)));
    store(to + LANES, bits_of<Floats>(interleave_odd(first, second)));
}

// The keys of LANES samples. 64-bit lane i of element 0 holds sample 2 i, that of element 1 holds sample 2 i + 1.
struct Keys {
    Longs seed[2], offset[2];

    // Loads the keys of the samples first, first + 1, ...; lanes beyond the last sample repeat it.
    static Keys load(const int64_t* keys, int64_t first, int64_t samples) {
        Keys k;
        for (int i = 0; i < LANES; i++) {
            const int64_t sample = std::min(first + i, samples - 1);
            k.seed[i % 2][i / 2] = (uint64_t)keys[2 * sample];
            k.offset[i % 2][i / 2] = (uint64_t)keys[2 * sample + 1];
        }
        return k;
    }
};

// Draws the four words of one block for LANES samples, where ``draw`` is the draw's offset plus the block: words[i]
// holds the i-th word of each sample.
static inline void words_across(const Keys& keys, uint64_t draw, Words words[4]) {
    const Block a = philox(keys.seed[0], keys.offset[0] + draw), b = philox(keys.seed[1], keys.offset[1] + draw);
    words[0] = halves(a.w0, b.w0), words[1] = halves(a.w1, b.w1);
    words[2] = halves(a.w2, b.w2), words[3] = halves(a.w3, b.w3);
}

// Draws the first ``count`` of the four normals of that block.
static inline void normals_across(const Keys& keys, uint64_t draw, int64_t count, Floats to[4]) {
    Words words[4];
    words_across(keys, draw, words);
    box_muller(words[0], words[1], to[0], to[1]);
    if (count > 2) box_muller(words[2], words[3], to[2], to[3]);
}

// Draws the uniform of element 0 for LANES samples.
static inline Floats uniforms_across(const Keys& keys, uint64_t draw) {
    Words words[4];
    words_across(keys, draw, words);
    return __builtin_convertvector(words[0] & 0xFFFFFFu, Floats) * 0x1p-24f;
}

}  // namespace fastsde
