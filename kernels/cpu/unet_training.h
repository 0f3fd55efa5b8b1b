// The layers of a U-Net in training, and where their signals are in memory.

#pragma once

#include <vector>

#include "activations.h"
#include "blocked.h"
#include "memory.h"

namespace fastsde {

constexpr int64_t MAX_PANELS = 256;   // of the channels of a layer's input
constexpr int64_t ROWS_EACH = 32;     // channels of the input in a part of the gradient of weights
constexpr int64_t RUN_PIXELS = 7;     // so many that a run of gradients stays in the first-level cache
constexpr int64_t WEIGHT_PARTS = 16;  // at least, of the gradient of a layer's weights, if there are so many lines

// Which pixel of the input reaches pixel i of the output through tap k, along one axis.
enum Map {
    SAME,      // i + k - 1: a convolution
    REVERSED,  // i - (k - 1): its transpose
    UP,        // (i - (k - 1)) / 2: a transposed convolution of stride 2
    DOWN       // 2 i + k - 1: its transpose
};

static inline Map transposed(Map map) { return map == SAME ? REVERSED : map == UP ? DOWN : SAME; }

// Returns that pixel, or -1 if there is none.
static inline int64_t source(Map map, int64_t i, int64_t k, int64_t size) {
    int64_t from = map == SAME ? i + k - 1 : map == DOWN ? 2 * i + k - 1 : i + 1 - k;
    if (map == UP) {
        if (from % 2) return -1;
        from /= 2;
    }
    return from >= 0 && from < size ? from : -1;
}

// The pixels of ``from`` that pixel (y, x) of a 2 x 2 pool is the largest of, in PyTorch's order.
struct Window {
    int64_t pixels[4], count = 0;

    Window(const Blocked& from, int64_t y, int64_t x) {
        const int64_t top = 2 * y - from.height % 2, left = 2 * x - from.width % 2;
        for (int64_t i = std::max<int64_t>(top, 0); i <= top + 1; i++)
            for (int64_t j = std::max<int64_t>(left, 0); j <= left + 1; j++) pixels[count++] = i * from.width + j;
    }
};

// The derivative of log sigmoid from its value v: 1 - e^v, to a few roundings even where it is small.
static inline Floats slope_at(Floats v) {
    const Floats x = at_least(v * 1.44269504f, -126.0f);
    const Floats whole = nearest(x);
    const Floats f = x - whole;
    const Floats rest = f * polynomial(f, 0.693147182f, 0.240226507f, 0.0555041087f, 0.00961812911f, 0.00133335581f,
                                       0.000154035304f);
    const Ints exponent = __builtin_convertvector(whole == whole ? whole : Floats{}, Ints);
    const Floats power = bits_of<Floats>((exponent + 127) << 23);
    return (1.0f - power) - power * rest;
}

struct Shapes {
    int64_t batch, image_channels, height, width, levels;
    const int64_t* channels;
    bool modulates;
};

struct Arguments {
    const float* const *weights;
    const float* const *biases;
    const float* films;
    float* const *d_weights;
    float* const *d_biases;
    float* d_films;
};

// PyTorch's weights [.., .., 3, 3] as the [9, rows, columns] of a product.
struct Form {
    int64_t rows, columns, row_stride, column_stride;
};

// The gradient of weights [9, rows, columns] as a sum over ``height`` lines of ``width`` pixels (y, x): of the channels
// of a at (y + a_moves k, x + ...) times those of b at (b_stride y + b_moves k, ...), with k = -1, 0, 1 for each tap.
struct Outer {
    Blocked a, b;
    int64_t rows, columns, height, width, a_moves, b_moves, b_stride;
};

struct Layer {
    int64_t number, inputs, outputs, film;  // film: where its scales are
    Map map;
    bool pools, is_last;
    Blocked in, out, d_in, d_out, sums;
    Blocked before, d_before;  // what is pooled
    int64_t own_panels;        // of the input whose gradient is complete without the pool's
    float *forward, *backward, *gradient;
    int64_t weights_size, slots, sums_offset;
    Form forward_form, backward_form;
    Outer outer;
};

// All of it in one run of memory; with null, only its size.
struct Network {
    Blocks blocks;
    std::vector<Layer> layers;
    int64_t widths = 0, floats = 0;

    Network(const Shapes& shapes, float* memory) : blocks(shapes.batch), memory_(memory) {
        const int64_t levels = shapes.levels, *channels = shapes.channels;
        std::vector<Blocked> wide, d_wide;  // per level: the decoder's channels first, then the encoder's
        int64_t height = shapes.height, width = shapes.width;
        for (int64_t l = 0; l < levels; l++, height = (height + 1) / 2, width = (width + 1) / 2) {
            const int64_t panels = (l + 1 < levels ? 2 : 1) * channels[l] / PANEL;
            wide.push_back(signal(height, width, panels)), d_wide.push_back(signal(height, width, panels));
        }
        const auto own = [&](int64_t l) { return l + 1 < levels ? channels[l] / PANEL : 0; };
        for (int64_t l = 0; l < levels; l++) {
            Layer layer{};
            layer.inputs = l ? channels[l - 1] : shapes.image_channels + 1, layer.outputs = channels[l];
            layer.in = signal(wide[l].height, wide[l].width, ceil_div(layer.inputs, PANEL));
            layer.out = wide[l].from(own(l)), layer.d_out = d_wide[l].from(own(l));
            if (l) layer.before = wide[l - 1].from(own(l - 1)), layer.d_before = d_wide[l - 1].from(own(l - 1));
            layer.pools = l > 0;
            add(layer, SAME, shapes.modulates);
        }
        for (int64_t l = levels - 1; l > 0; l--) {
            Layer layer{};
            layer.inputs = wide[l].panels * PANEL, layer.outputs = channels[l - 1];
            layer.in = wide[l], layer.d_in = d_wide[l], layer.own_panels = l + 1 < levels ? own(l) : wide[l].panels;
            layer.out = wide[l - 1], layer.d_out = d_wide[l - 1];
            add(layer, UP, shapes.modulates);
        }
        Layer layer{};
        layer.inputs = wide[0].panels * PANEL, layer.outputs = channels[0], layer.own_panels = own(0);
        layer.in = wide[0], layer.d_in = d_wide[0];
        layer.out = signal(shapes.height, shapes.width, channels[0] / PANEL);
        layer.d_out = signal(shapes.height, shapes.width, channels[0] / PANEL);
        add(layer, SAME, shapes.modulates);
        Layer last{};
        last.inputs = channels[0], last.outputs = shapes.image_channels, last.own_panels = channels[0] / PANEL;
        last.in = layer.out, last.d_in = layer.d_out, last.is_last = true;
        last.d_out = signal(shapes.height, shapes.width, ceil_div(last.outputs, PANEL));
        add(last, SAME, false);
    }

    // Sums over the pixels of each image of a block, of gradients [images, 16] and of their products with the sums.
    float* sums_of(const Layer& layer, int64_t block, int64_t panel) const {
        const int64_t panels = ceil_div(layer.outputs, PANEL);
        return memory_ + layer.sums_offset + (block * panels + panel) * 2 * blocks.each * PANEL;
    }

  private:
    void add(Layer& layer, Map map, bool modulates) {
        const int64_t in = layer.inputs, out = layer.outputs, panels = ceil_div(out, PANEL);
        layer.number = (int64_t)layers.size(), layer.map = map;
        layer.film = widths, widths += layer.is_last ? 0 : 2 * out;
        if (modulates) layer.sums = signal(layer.out.height, layer.out.width, panels);
        layer.weights_size = 9 * in * out;
        // PyTorch's weights are [out, in, 3, 3], or [in, out, 3, 3] of a transposed convolution.
        const int64_t of_in = map == UP ? 9 * out : 9, of_out = map == UP ? 9 : 9 * in;
        layer.forward_form = Form{in, out, of_in, of_out};
        layer.backward_form = Form{out, in, of_out, of_in};
        layer.outer = layer.is_last ? Outer{layer.d_out, layer.in, out, in, layer.in.height, layer.in.width, 0, 1, 1}
                      : map == UP   ? Outer{layer.in, layer.d_out, in, out, layer.in.height, layer.in.width, 0, 1, 2}
                                    : Outer{layer.in, layer.d_out, in, out, layer.in.height, layer.in.width, 1, 0, 1};
        const int64_t parts = Columns::groups(layer.outer.columns) * ceil_div(layer.outer.rows, ROWS_EACH);
        const int64_t most = std::min<int64_t>(8, blocks.count * layer.outer.height);
        layer.slots = std::min(most, ceil_div(WEIGHT_PARTS, parts));
        layer.forward = take(layer.weights_size), layer.backward = take(layer.weights_size);
        layer.gradient = take(layer.slots * layer.weights_size);
        layer.sums_offset = floats, take(blocks.count * panels * 2 * blocks.each * PANEL);
        layers.push_back(layer);
    }

    Blocked signal(int64_t height, int64_t width, int64_t panels) {
        return Blocked{take(blocks.count * height * width * panels * blocks.each * PANEL), height, width, panels,
                       blocks.each};
    }

    float* take(int64_t count) {
        float* taken = memory_ ? memory_ + floats : nullptr;
        floats += ceil_div(count, 16) * 16;
        return taken;
    }

    float* memory_;
};

}  // namespace fastsde
