// The layers of a U-Net in training, and where their signals are in memory.

#pragma once

#include <vector>

#include "activations.h"
#include "blocked.h"
#include "memory.h"

namespace fastsde {

constexpr int64_t MAX_PANELS = 256;   // of the channels of a layer's input
constexpr int64_t CACHED_WORDS = 1 << 16;  // of weights: a quarter of a second-level cache
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

// Returns the last pixel of the input that reaches pixel i of the output, or -1 before the first one.
static inline int64_t furthest(Map map, int64_t i, int64_t size) {
    if (i < 0) return -1;
    return std::min(size - 1, map == DOWN ? 2 * i + 1 : map == UP ? (i + 1) / 2 : i + 1);
}

// The pixels of a signal that pixel (y, x) of a 2 x 2 pool is the largest of, in PyTorch's order. With an odd size the
// first row or column is on its own.
struct Window {
    int64_t pixels[4], count = 0;

    Window(int64_t height, int64_t width, int64_t y, int64_t x) {
        const int64_t top = 2 * y - height % 2, left = 2 * x - width % 2;
        for (int64_t i = std::max<int64_t>(top, 0); i <= top + 1; i++)
            for (int64_t j = std::max<int64_t>(left, 0); j <= left + 1; j++) pixels[count++] = i * width + j;
    }
};

// The derivative of log sigmoid from its value v: 1 - e^v, to a few roundings even where it is small.
static inline Floats slope_at(Floats v) {
    const Floats x = at_least(v * 1.44269504f, -126.0f);
    const Floats whole = nearest(x);
    const Floats f = x - whole;
    const Floats rest = f * polynomial(f, 0.693147182f, 0.240226507f, 0.0555041087f, 0.00961812911f, 0.00133335581f,
                                       0.000154035304f);  // 2^f - 1
    const Ints exponent = __builtin_convertvector(whole == whole ? whole : Floats{}, Ints);
    const Floats power = bits_of<Floats>((exponent + 127) << 23);
    return (1.0f - power) - power * rest;
}

struct Shapes {
    int64_t batch, image_channels, height, width, levels;
    const int64_t* channels;
    bool modulates, trains;  // trains: with gradients of weights, biases, scales and shifts
};

// PyTorch's weights [.., .., 3, 3] as the [9, rows, columns] of a product.
struct Form {
    int64_t rows, columns, row_stride, column_stride;
};

// The lines of pixels of a signal that are computed at once.
struct Lines {
    int64_t each, count;

    Lines(int64_t height, int64_t width) : each(std::min(height, ceil_div(8, width))), count(ceil_div(height, each)) {}
};

// The gradient of weights [9, rows, columns] as a sum over ``height`` lines of ``width`` pixels (y, x): of the channels
// of a at (y + a_moves k, x + ...) times those of b at (b_stride y + b_moves k, ...), with k = -1, 0, 1 for each tap.
template <class T>
struct Outer {
    Signal<T> a, b;
    int64_t rows, columns, height, width, a_moves, b_moves, b_stride;
};

template <class T>
struct Layer {
    int64_t number, inputs, outputs, film;  // film: where its scales are
    Map map;
    bool pools, is_last;
    Signal<T> in, out, d_in, d_out;
    Signal<float> sums;
    Signal<T> before, d_before;  // what is pooled
    int64_t behind;  // the number of the layer that its input, or what is pooled, comes from
    int64_t own;     // panels of the input whose gradient is complete without a pool's
    float *forward, *backward, *gradient;
    int64_t weights_size, slots;
    float* totals;  // of its gradient, for the lines of the pass that completes it
    int64_t totals_lines;
    Form forward_form, backward_form;
    Outer<T> outer;
};

// All of it in one run of memory; with null, only its size.
template <class T>
struct Network {
    Blocks blocks;
    std::vector<Layer<T>> layers;
    int64_t widths = 0, floats = 0;

    Network(const Shapes& shapes, float* memory) : blocks(shapes.batch), memory_(memory) {
        const int64_t levels = shapes.levels, *channels = shapes.channels;
        std::vector<Signal<T>> wide, d_wide;  // per level: the decoder's channels first, then the encoder's
        int64_t height = shapes.height, width = shapes.width;
        for (int64_t l = 0; l < levels; l++, height = (height + 1) / 2, width = (width + 1) / 2) {
            const int64_t panels = (l + 1 < levels ? 2 : 1) * channels[l] / PANEL;
            wide.push_back(signal<T>(height, width, panels)), d_wide.push_back(signal<T>(height, width, panels));
        }
        const auto own = [&](int64_t l) { return l + 1 < levels ? channels[l] / PANEL : 0; };
        for (int64_t l = 0; l < levels; l++) {
            Layer<T> layer{};
            layer.inputs = l ? channels[l - 1] : shapes.image_channels + 1, layer.outputs = channels[l];
            layer.in = signal<T>(wide[l].height, wide[l].width, ceil_div(layer.inputs, PANEL));
            layer.out = wide[l].from(own(l)), layer.d_out = d_wide[l].from(own(l));
            if (l) layer.before = wide[l - 1].from(own(l - 1)), layer.d_before = d_wide[l - 1].from(own(l - 1));
            layer.pools = l > 0, layer.behind = l - 1;
            // The gradient of the lowest level's output is complete after the decoder's, of others after the pool's.
            const int64_t last = std::min(l + 1, levels - 1);
            add(layer, SAME, shapes, Lines(wide[last].height, wide[last].width).count);
        }
        for (int64_t l = levels - 1; l >= 0; l--) {  // with l = 0, the first layer of the head
            Layer<T> layer{};
            layer.inputs = wide[l].panels * PANEL, layer.outputs = channels[std::max<int64_t>(l - 1, 0)];
            layer.in = wide[l], layer.d_in = d_wide[l], layer.own = l + 1 < levels ? own(l) : wide[l].panels;
            layer.behind = (int64_t)layers.size() - 1;
            layer.out = l ? wide[l - 1] : signal<T>(shapes.height, shapes.width, channels[0] / PANEL);
            layer.d_out = l ? d_wide[l - 1] : signal<T>(shapes.height, shapes.width, channels[0] / PANEL);
            add(layer, l ? UP : SAME, shapes, Lines(layer.out.height, layer.out.width).count);
        }
        Layer<T> last{};
        last.inputs = channels[0], last.outputs = shapes.image_channels, last.own = channels[0] / PANEL;
        last.in = layers.back().out, last.d_in = layers.back().d_out, last.is_last = true;
        last.behind = (int64_t)layers.size() - 1;
        last.d_out = signal<T>(shapes.height, shapes.width, ceil_div(last.outputs, PANEL));
        add(last, SAME, shapes, 0);
    }

    // Sums over the pixels of some lines of each image of a block, of gradients [images, 16] and, after them, of their
    // products with the layer's sums.
    float* totals(const Layer<T>& layer, int64_t line, int64_t block, int64_t panel) const {
        const int64_t panels = ceil_div(layer.outputs, PANEL);
        return layer.totals + ((line * blocks.count + block) * panels + panel) * 2 * blocks.each * PANEL;
    }

  private:
    void add(Layer<T>& layer, Map map, const Shapes& shapes, int64_t lines) {
        const int64_t in = layer.inputs, out = layer.outputs, panels = ceil_div(out, PANEL);
        layer.number = (int64_t)layers.size(), layer.map = map;
        layer.film = widths, widths += layer.is_last ? 0 : 2 * out;
        if (shapes.modulates && shapes.trains && !layer.is_last)
            layer.sums = signal<float>(layer.out.height, layer.out.width, panels);
        // PyTorch's weights are [out, in, 3, 3], or [in, out, 3, 3] of a transposed convolution.
        const int64_t of_in = map == UP ? 9 * out : 9, of_out = map == UP ? 9 : 9 * in;
        layer.forward_form = Form{in, out, of_in, of_out};
        layer.backward_form = Form{out, in, of_out, of_in};
        const int64_t height = layer.in.height, width = layer.in.width;
        layer.outer = layer.is_last ? Outer<T>{layer.d_out, layer.in, out, in, height, width, 0, 1, 1}
                      : map == UP   ? Outer<T>{layer.in, layer.d_out, in, out, height, width, 0, 1, 2}
                                    : Outer<T>{layer.in, layer.d_out, in, out, height, width, 1, 0, 1};
        const int64_t parts = Columns::groups(layer.outer.columns) * ceil_div(layer.outer.rows, ROWS_EACH);
        const int64_t most = std::min<int64_t>(8, blocks.count * layer.outer.height);
        layer.slots = std::min(most, ceil_div(WEIGHT_PARTS, parts));
        layer.weights_size = 9 * in * out;
        layer.forward = take(9 * (in + 1) * out), layer.backward = take(9 * (out + 1) * in);
        layer.gradient = take(shapes.trains ? layer.slots * layer.weights_size : 0);
        const int64_t totals = lines * blocks.count * panels * 2 * blocks.each * PANEL;
        layer.totals_lines = lines, layer.totals = take(shapes.trains ? totals : 0);
        layers.push_back(layer);
    }

    template <class Element>
    Signal<Element> signal(int64_t height, int64_t width, int64_t panels) {
        Signal<Element> made{nullptr, nullptr, height, width, panels, blocks.each};
        const int64_t places = made.place(blocks.count, 0, 0), per_word = KindOf<Element>::PER_WORD;
        made.data = (Element*)take(places * blocks.each * PANEL / per_word);
        if (per_word > 1) made.pairs = take(places * made.image_words());
        return made;
    }

    float* take(int64_t count) {
        float* taken = memory_ ? memory_ + floats : nullptr;
        floats += ceil_div(count, 16) * 16;
        return taken;
    }

    float* memory_;
};

}  // namespace fastsde
