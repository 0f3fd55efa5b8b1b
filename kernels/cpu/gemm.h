// Matrix products whose operands stay in the cache: c [m, n] = a b, with any strides of a.

#pragma once

#include <algorithm>

#include "simd.h"

namespace fastsde {

// What a sum starts from: c itself, one number per row, one number per column, or 0.
struct Start {
    bool from_c = false;
    const float* of_row = nullptr;
    const float* of_column = nullptr;
};

// a [m, k], any strides; b [k, n], contiguous rows.
struct Product {
    const float* a;
    int64_t a_row, a_column;
    const float* b;
    int64_t b_row;
    float* c;
    int64_t c_row, depth;
    Start start;
};

// Keeps a vector in a register: GCC would load it again for each use, and loads are what limits the products.
static inline void in_register(Floats& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#else
    (void)v;
#endif
}

// How a product's 32-bit elements are multiplied: as floats ...
struct Single {
    static Floats factor(const float* a) { return all(*a); }
    static Floats add(Floats sum, Floats factor, Floats vector) { return sum + factor * vector; }
};

// ... or as pairs of bf16, whose two products are added.
#if defined(FASTSDE_BF16)
struct Pairs {
    static Floats factor(const float* a) { return bits_of<Floats>(_mm512_set1_epi32(bits_of<int32_t>(*a))); }
    static Floats add(Floats sum, Floats factor, Floats vector) {
        return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(factor), bits_of<__m512bh>(vector));
    }
};
#endif

// Computes ROWS rows of c from ``row`` on, and of each VECTORS vectors from ``column`` on; the sums stay in registers.
template <class Kind, int ROWS, int VECTORS>
__attribute__((noinline)) static void product_tile(const Product& p, int64_t row, int64_t column) {
    Floats sum[ROWS][VECTORS];
    float* c = p.c + row * p.c_row + column;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++)
            sum[i][j] = p.start.from_c      ? load(c + i * p.c_row + j * LANES)
                        : p.start.of_row    ? all(p.start.of_row[row + i])
                        : p.start.of_column ? load(p.start.of_column + column + j * LANES)
                                            : Floats{};
    const float* a = p.a + row * p.a_row;
    const float* b = p.b + column;
    for (int64_t k = 0; k < p.depth; k++, a += p.a_column, b += p.b_row) {
        Floats vectors[VECTORS];
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) {
            vectors[j] = load(b + j * LANES);
            in_register(vectors[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Floats factor = Kind::factor(a + i * p.a_row);
#pragma GCC unroll 16
            for (int j = 0; j < VECTORS; j++) sum[i][j] = Kind::add(sum[i][j], factor, vectors[j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) store(c + i * p.c_row + j * LANES, sum[i][j]);
}

template <class Kind, int VECTORS>
static void product_columns(const Product& p, int64_t rows, int64_t column) {
    constexpr int MANY = LANES == 16 && VECTORS == 2 ? 12 : 6;  // so many that their sums fit in registers
    int64_t row = 0;
    for (; row + MANY <= rows; row += MANY) product_tile<Kind, MANY, VECTORS>(p, row, column);
    for (; MANY > 6 && row + 6 <= rows; row += 6) product_tile<Kind, 6, VECTORS>(p, row, column);
    for (; row + 4 <= rows; row += 4) product_tile<Kind, 4, VECTORS>(p, row, column);
    for (; row + 2 <= rows; row += 2) product_tile<Kind, 2, VECTORS>(p, row, column);
    for (; row < rows; row++) product_tile<Kind, 1, VECTORS>(p, row, column);
}

constexpr int64_t COLUMNS = 16;  // widths are multiples of this

// Computes c [rows, columns], with columns a multiple of COLUMNS.
template <class Kind = Single>
static inline void multiply(const Product& p, int64_t rows, int64_t columns) {
    int64_t column = 0;
    if (LANES == 16) {
        for (; column + 4 * LANES <= columns; column += 4 * LANES) product_columns<Kind, 4>(p, rows, column);
        for (; column + 2 * LANES <= columns; column += 2 * LANES) product_columns<Kind, 2>(p, rows, column);
        for (; column < columns; column += LANES) product_columns<Kind, 1>(p, rows, column);
    } else {
        for (; column < columns; column += 2 * LANES) product_columns<Kind, 2>(p, rows, column);
    }
}

// c [rows, samples] = start + w x for a few samples. Vectors run along the depth, so that samples need no padding.
struct Dots {
    const float* w;  // [rows, depth], rows w_row apart
    int64_t w_row;
    const float* x;  // [samples, depth], rows x_row apart
    int64_t x_row;
    float* c;
    int64_t c_row, depth;
    const float* start;  // [rows], or null for zeros
    bool from_c;         // whether the sum starts from c, too
};

// Computes OUTS rows of c from ``row`` on and SAMPLES columns from ``sample`` on; the sums stay in registers.
template <int OUTS, int SAMPLES>
__attribute__((noinline)) static void dots_tile(const Dots& p, int64_t row, int64_t sample) {
    Floats sum[OUTS][SAMPLES];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; s++) sum[o][s] = Floats{};
    const float *w = p.w + row * p.w_row, *x = p.x + sample * p.x_row;
    for (int64_t k = 0; k < p.depth; k += LANES) {
        const int64_t here = std::min<int64_t>(LANES, p.depth - k);
        Floats weights[OUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++) weights[o] = load(w + o * p.w_row + k, here);
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; s++) {
            const Floats signal = load(x + s * p.x_row + k, here);
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; o++) sum[o][s] += weights[o] * signal;
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; s++) {
            float& c = p.c[(row + o) * p.c_row + sample + s];
            c = (p.from_c ? c : 0.0f) + (p.start ? p.start[row + o] : 0.0f) + sum_of(sum[o][s]);
        }
}

template <int OUTS>
static void dots_rows(const Dots& p, int64_t row, int64_t samples) {
    int64_t sample = 0;
    for (; sample + 8 <= samples; sample += 8) dots_tile<OUTS, 8>(p, row, sample);
    if (sample + 4 <= samples) dots_tile<OUTS, 4>(p, row, sample), sample += 4;
    if (sample + 2 <= samples) dots_tile<OUTS, 2>(p, row, sample), sample += 2;
    if (sample < samples) dots_tile<OUTS, 1>(p, row, sample);
}

static inline void multiply(const Dots& p, int64_t rows, int64_t samples) {
    constexpr int MANY = LANES == 16 ? 2 : 1;  // so many that their sums for eight samples fit in registers
    int64_t row = 0;
    for (; samples <= 4 && row + 4 <= rows; row += 4) dots_rows<4>(p, row, samples);
    for (; row + MANY <= rows; row += MANY) dots_rows<MANY>(p, row, samples);
    for (; row < rows; row++) dots_rows<1>(p, row, samples);
}

static inline int64_t padded(int64_t width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }

}  // namespace fastsde
