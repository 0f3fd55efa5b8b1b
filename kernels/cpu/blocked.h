// Signals of networks in training, blocked so that all operands of their products are adjacent in memory, and these
// products.
//
// A batch is cut into blocks of images. A signal is [block, pixel, panel, image, 16]: the images of a block lie next to
// each other, and so do the 16 channels of a panel. The rows of a product are the images of a pixel, whichever taps of
// a convolution reach it: nothing is padded, and sums stay in registers over all taps and channels. In bf16 products
// sum over pairs: of channels in a convolution, and of images in the gradient of weights, for which a signal is stored
// again, as [block, pixel, panel, pair of images, 16, 2].

#pragma once

#include <algorithm>

#include "elements.h"
#include "parts.h"

namespace fastsde {

constexpr int64_t PANEL = 16;                // channels
constexpr int64_t BLOCK_IMAGES = 32;         // at most
constexpr int PANELS = LANES == 16 ? 2 : 1;  // of the columns of a product: so many that its sums fit in registers
constexpr int VECTORS = PANEL / LANES;       // of a panel

// How a batch is cut into blocks.
struct Blocks {
    int64_t batch, each, count;

    explicit Blocks(int64_t batch) : batch(batch) {
        each = ceil_div(batch, ceil_div(batch, BLOCK_IMAGES));
        each = std::min<int64_t>(batch, ceil_div(each, 4) * 4);
        count = ceil_div(batch, each);
    }

    int64_t images(int64_t block) const { return std::min(each, batch - block * each); }
};

static inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const char*)from + byte, 0, 2);
}

template <class T>
struct Signal {
    static constexpr int64_t PER_WORD = KindOf<T>::PER_WORD;

    T* data;
    float* pairs;  // bf16 only
    int64_t height, width, panels, each;  // panels of a pixel; images of a block

    int64_t pixels() const { return height * width; }
    int64_t place(int64_t block, int64_t pixel, int64_t panel) const {
        return (block * pixels() + pixel) * panels + panel;
    }
    T* at(int64_t block, int64_t pixel, int64_t panel) const {
        return data + place(block, pixel, panel) * each * PANEL;
    }

    // The images of a panel in words, each with one image, or with a pair.
    int64_t image_words() const { return ceil_div(each, PER_WORD) * PANEL; }
    float* images_at(int64_t block, int64_t pixel, int64_t panel) const {
        return (PER_WORD == 1 ? (float*)data : pairs) + place(block, pixel, panel) * image_words();
    }

    Signal from(int64_t panel) const {
        if (!data) return *this;
        float* from = pairs ? pairs + panel * image_words() : nullptr;
        return Signal{data + panel * each * PANEL, from, height, width, panels, each};
    }

    // Fetches panels into the second-level cache, while something else is computed.
    void prefetch(int64_t block, int64_t pixel, int64_t panel, int64_t count = 1) const {
        fastsde::prefetch(at(block, pixel, panel), count * each * PANEL * (int64_t)sizeof(T));
    }
    void prefetch_images(int64_t block, int64_t pixel, int64_t panel, int64_t count) const {
        fastsde::prefetch(images_at(block, pixel, panel), count * image_words() * (int64_t)sizeof(float));
    }

    // Writes value(image, channel), a vector, for all images and channels of a panel.
    template <class Value>
    void write(int64_t block, int64_t pixel, int64_t panel, int64_t images, Value value) const {
        T* to = at(block, pixel, panel);
        if constexpr (PER_WORD == 1) {
            for (int64_t i = 0; i < images; i++)
                for (int64_t c = 0; c < PANEL; c += LANES) store(to + i * PANEL + c, value(i, c));
        }
#if defined(FASTSDE_BF16)
        else {
            float* pair = images_at(block, pixel, panel);
            for (int64_t i = 0; i < images; i += 2, pair += PANEL) {
                const Floats even = value(i, 0), odd = i + 1 < images ? value(i + 1, 0) : Floats{};
                store_as(to + i * PANEL, even);
                if (i + 1 < images) store_as(to + (i + 1) * PANEL, odd);
                store_pairs(pair, even, odd);
            }
        }
#endif
    }
};

// Columns of weights that are multiplied at once, PANELS panels or what is left: [9, rows, columns] of [9, rows, all].
struct Columns {
    int64_t panel, panels, offset;  // offset: in weights, whose groups of columns lie one after the other

    Columns(int64_t group, int64_t all, int64_t rows)
        : panel(group * PANELS), panels(std::min<int64_t>(PANELS, all / PANEL - panel)),
          offset(9 * rows * panel * PANEL) {}

    int64_t width() const { return panels * PANEL; }
    static int64_t groups(int64_t all) { return ceil_div(all / PANEL, (int64_t)PANELS); }
};

// A product of a panel of a pixel with its weights: a [images, words of 16 elements], b [words, columns].
struct Segment {
    const float *a, *b;
    int64_t words;
};

// Computes c [COLUMN_PANELS, each, 16] for ROWS images from ``image`` on: the sum over the segments.
template <class T, int ROWS, int COLUMN_PANELS>
__attribute__((noinline)) static void segments_tile(const Segment* segments, int64_t count, int64_t image, int64_t each,
                                                    float* c) {
    using Kind = typename KindOf<T>::Type;
    constexpr int WIDE = COLUMN_PANELS * VECTORS;
    constexpr int64_t ROW = PANEL / KindOf<T>::PER_WORD;
    Floats sum[ROWS][WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < WIDE; j++) sum[i][j] = Floats{};
    for (int64_t s = 0; s < count; s++) {
        const float *a = segments[s].a + image * ROW, *b = segments[s].b;
        const float* end = a + segments[s].words;
#pragma GCC unroll 4
        for (; a < end; a++, b += WIDE * LANES) {
            Floats vectors[WIDE];
#pragma GCC unroll 16
            for (int j = 0; j < WIDE; j++) {
                vectors[j] = load(b + j * LANES);
                in_register(vectors[j]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                const Floats factor = Kind::factor(a + i * ROW);
#pragma GCC unroll 16
                for (int j = 0; j < WIDE; j++) sum[i][j] = Kind::add(sum[i][j], factor, vectors[j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < WIDE; j++)
            store(c + (j / VECTORS * each + image + i) * PANEL + j % VECTORS * LANES, sum[i][j]);
}

template <class T, int COLUMN_PANELS>
static void multiply_segments(const Segment* segments, int64_t count, int64_t images, int64_t each, float* c) {
    constexpr int MANY = LANES == 16 ? 12 : LANES == 8 ? 4 : 2;  // so many that their sums fit in registers
    int64_t i = 0;
    for (; i + MANY <= images; i += MANY) segments_tile<T, MANY, COLUMN_PANELS>(segments, count, i, each, c);
    if constexpr (MANY > 8)
        for (; i + 8 <= images; i += 8) segments_tile<T, 8, COLUMN_PANELS>(segments, count, i, each, c);
    if constexpr (MANY > 4)
        for (; i + 4 <= images; i += 4) segments_tile<T, 4, COLUMN_PANELS>(segments, count, i, each, c);
    for (; i + 2 <= images; i += 2) segments_tile<T, 2, COLUMN_PANELS>(segments, count, i, each, c);
    for (; i < images; i++) segments_tile<T, 1, COLUMN_PANELS>(segments, count, i, each, c);
}

// A run of pixels whose images are summed over: a [pixels, words of images, 16], b [pixels, panels, words of images,
// 16].
struct Run {
    const float *a, *b;
    int64_t a_pixel, b_pixel, b_panel, pixels, words;
};

// Adds to c [ROWS, columns] the sum over the images and pixels of the run of a^T b, for ROWS channels of a.
template <class T, int ROWS, int COLUMN_PANELS>
__attribute__((noinline)) static void outer_tile(const Run& run, float* c) {
    using Kind = typename KindOf<T>::Type;
    constexpr int WIDE = COLUMN_PANELS * VECTORS;
    Floats sum[ROWS][WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < WIDE; j++) sum[i][j] = Floats{};
    const int64_t b_panel = run.b_panel;
    for (int64_t pixel = 0; pixel < run.pixels; pixel++) {
        const float *a = run.a + pixel * run.a_pixel, *b = run.b + pixel * run.b_pixel;
        const float* end = a + run.words * PANEL;
#pragma GCC unroll 2
        for (; a < end; a += PANEL, b += PANEL) {
            Floats vectors[WIDE];
#pragma GCC unroll 16
            for (int j = 0; j < WIDE; j++) {
                vectors[j] = load(b + j / VECTORS * b_panel + j % VECTORS * LANES);
                in_register(vectors[j]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                const Floats factor = Kind::factor(a + i);
#pragma GCC unroll 16
                for (int j = 0; j < WIDE; j++) sum[i][j] = Kind::add(sum[i][j], factor, vectors[j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < WIDE; j++) {
            float* to = c + (i * WIDE + j) * LANES;
            store(to, load(to) + sum[i][j]);
        }
}

// Adds to c [channels, columns] for up to 16 channels of a.
template <class T, int COLUMN_PANELS>
static void multiply_run(Run run, int64_t channels, float* c) {
    constexpr int MANY = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
    const auto rows = [&](auto count) {
        outer_tile<T, decltype(count)::value, COLUMN_PANELS>(run, c);
        channels -= count, run.a += count, c += count * COLUMN_PANELS * PANEL;
    };
    while (channels >= MANY) rows(std::integral_constant<int, MANY>());
    if constexpr (MANY > 4)
        if (channels >= 4) rows(std::integral_constant<int, 4>());
    if constexpr (MANY > 2)
        if (channels >= 2) rows(std::integral_constant<int, 2>());
    if (channels >= 1) rows(std::integral_constant<int, 1>());
}

}  // namespace fastsde
