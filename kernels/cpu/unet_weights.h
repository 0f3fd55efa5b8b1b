// The weights of a U-Net in training: packed for its products, and their gradients.
//
// All functions must be called by all threads of a team, which then have to wait for each other.

#pragma once

#include "unet_training.h"

namespace fastsde {

// Runs body(row, columns, where the weights of both are in PyTorch's) for all rows of all columns, ``step`` apart.
template <class Body>
static void for_weights(const Form& form, int64_t step, Body body) {
    const int64_t groups = Columns::groups(form.columns), row_parts = ceil_div(form.rows, PANEL);
#pragma omp for schedule(static) nowait
    for (int64_t part = 0; part < groups * row_parts; part++) {
        const Columns columns(part / row_parts, form.columns, ceil_div(form.rows, step));
        const int64_t first = part % row_parts * PANEL;
        for (int64_t row = first; row < std::min(first + PANEL, form.rows); row += step)
            body(row, columns, row * form.row_stride + columns.panel * PANEL * form.column_stride);
    }
}

// Packs weights as words [9, rows, columns].
template <class T>
static void pack(const Form& form, const float* weights, float* to) {
    constexpr int64_t PER_WORD = KindOf<T>::PER_WORD;
    const int64_t words = ceil_div(form.rows, PER_WORD);
    for_weights(form, PER_WORD, [&](int64_t row, const Columns& columns, int64_t from) {
        for (int64_t c = 0; c < columns.width(); c += LANES) {
            float lanes[PER_WORD][9][LANES]{};
            for (int64_t r = 0; r < std::min(PER_WORD, form.rows - row); r++)
                for (int64_t k = 0; k < LANES; k++)
                    for (int64_t tap = 0; tap < 9; tap++)
                        lanes[r][tap][k] = weights[from + r * form.row_stride + (c + k) * form.column_stride + tap];
            float* word = to + columns.offset + row / PER_WORD * columns.width() + c;
            for (int64_t tap = 0; tap < 9; tap++, word += words * columns.width()) {
                if constexpr (PER_WORD == 1) store(word, load(lanes[0][tap]));
#if defined(FASTSDE_BF16)
                if constexpr (PER_WORD == 2) store_pairs(word, load(lanes[0][tap]), load(lanes[1][tap]));
#endif
            }
        }
    });
}

// Packs weights to few channels as [channels, 9, rows].
static void pack_images(const Form& form, int64_t channels, bool reverses, const float* weights, float* to) {
#pragma omp for schedule(static) nowait
    for (int64_t channel = 0; channel < channels; channel++)
        for (int64_t row = 0; row < form.rows; row++)
            for (int64_t tap = 0; tap < 9; tap++)
                to[(channel * 9 + (reverses ? 8 - tap : tap)) * form.rows + row] =
                    weights[channel * form.column_stride + row * form.row_stride + tap];
}

// Packs the weights of a layer in the forms of its products.
template <class T>
static void pack(const Layer<T>& layer, const float* weights) {
    if (layer.is_last)
        pack_images(layer.forward_form, layer.outputs, false, weights, layer.forward);
    else
        pack<T>(layer.forward_form, weights, layer.forward);
    if (layer.number)
        pack<T>(layer.backward_form, weights, layer.backward);
    else
        pack_images(layer.backward_form, layer.inputs - 1, true, weights, layer.backward);
}

// Adds the slots of a gradient and writes it as PyTorch has it.
template <class T>
static void unpack_weights(const Layer<T>& layer, float* weights) {
    const Form& form = layer.is_last ? layer.backward_form : layer.forward_form;
    for_weights(form, 1, [&](int64_t row, const Columns& columns, int64_t to) {
        const int64_t width = columns.width();
        for (int64_t tap = 0; tap < 9; tap++) {
            float* sums = layer.gradient + columns.offset + (tap * form.rows + row) * width;
            for (int64_t slot = 1; slot < layer.slots; slot++)
                for (int64_t c = 0; c < width; c++) sums[c] += sums[slot * layer.weights_size + c];
            for (int64_t c = 0; c < width; c++) weights[to + c * form.column_stride + tap] = sums[c];
        }
    });
}

// Prefetches what the run from pixel x on of a line, or the first one of the next line, is the first to need.
template <class T>
static void fetch_run(const Blocks& blocks, const Outer<T>& by, const Columns& columns, int64_t line, int64_t x,
                      int64_t first_row, int64_t rows) {
    if (x >= by.width) line++, x = 0;
    const int64_t block = line / by.height, y = line % by.height, last = std::min(x + RUN_PIXELS, by.width) - 1;
    if (block == blocks.count) return;
    const auto fetch = [&](const Signal<T>& of, int64_t stride, int64_t moves, int64_t panel, int64_t panels) {
        const auto end = [=](int64_t i, int64_t size) { return std::min(stride * i + moves, size - 1); };
        for (int64_t i = std::max<int64_t>(0, stride * y + moves - stride + 1); i <= end(y, of.height); i++)
            for (int64_t j = x ? stride * (x - 1) + moves + 1 : 0; j <= end(last, of.width); j++)
                of.prefetch_images(block, i * of.width + j, panel, panels);
    };
    fetch(by.a, 1, by.a_moves, first_row / PANEL, ceil_div(rows, PANEL));
    fetch(by.b, by.b_stride, by.b_moves, columns.panel, columns.panels);
}

// Adds a tap's products of a run of pixels of a line.
template <class T>
static void add_run(const Blocks& blocks, const Outer<T>& by, const Columns& columns, int64_t block, int64_t y,
                    int64_t first, int64_t last, int64_t tap, int64_t first_row, int64_t rows, float* to) {
    const Signal<T>&a = by.a, &b = by.b;
    const int64_t down = tap / 3 - 1, right = tap % 3 - 1;
    const int64_t a_y = y + by.a_moves * down, b_y = by.b_stride * y + by.b_moves * down;
    if (a_y < 0 || a_y >= a.height || b_y < 0 || b_y >= b.height) return;
    const int64_t a_by = by.a_moves * right, b_by = by.b_moves * right;
    while (first <= last && (first + a_by < 0 || by.b_stride * first + b_by < 0)) first++;
    while (last >= first && (last + a_by >= a.width || by.b_stride * last + b_by >= b.width)) last--;
    if (first > last) return;
    const float* from = b.images_at(block, b_y * b.width + by.b_stride * first + b_by, columns.panel);
    Run run{nullptr, from, a.panels * a.image_words(), by.b_stride * b.panels * b.image_words(), b.image_words(),
            last + 1 - first, ceil_div(blocks.images(block), KindOf<T>::PER_WORD)};
    for (int64_t row = 0; row < rows; row += PANEL) {
        run.a = a.images_at(block, a_y * a.width + first + a_by, (first_row + row) / PANEL);
        float* c = to + (tap * by.rows + row) * columns.width();
        if (columns.panels == 1)
            multiply_run<T, 1>(run, std::min(PANEL, rows - row), c);
        else
            multiply_run<T, PANELS>(run, std::min(PANEL, rows - row), c);
    }
}

// Sums the gradient of the weights over all images and pixels, in slots that are added later.
template <class T>
static void backward_weights(const Blocks& blocks, const Layer<T>& layer) {
    const Outer<T>& outer = layer.outer;
    const int64_t groups = Columns::groups(outer.columns), row_parts = ceil_div(outer.rows, ROWS_EACH);
    const int64_t lines = blocks.count * outer.height, tiles = groups * row_parts;
#pragma omp for schedule(dynamic) nowait
    for (int64_t part = 0; part < layer.slots * tiles; part++) {
        const int64_t slot = part / tiles, first_row = part % row_parts * ROWS_EACH;
        const int64_t rows = std::min(ROWS_EACH, outer.rows - first_row);
        const Columns columns(part % tiles / row_parts, outer.columns, outer.rows);
        float* to = layer.gradient + slot * layer.weights_size + columns.offset + first_row * columns.width();
        for (int64_t tap = 0; tap < 9; tap++)
            std::fill_n(to + tap * outer.rows * columns.width(), rows * columns.width(), 0.0f);
        for (int64_t line = slot * lines / layer.slots; line < (slot + 1) * lines / layer.slots; line++)
            for (int64_t x = 0; x < outer.width; x += RUN_PIXELS) {
                fetch_run(blocks, outer, columns, line, x + RUN_PIXELS, first_row, rows);
                for (int64_t tap = 0; tap < 9; tap++)
                    add_run(blocks, outer, columns, line / outer.height, line % outer.height, x,
                            std::min(x + RUN_PIXELS, outer.width) - 1, tap, first_row, rows, to);
            }
    }
}

}  // namespace fastsde
