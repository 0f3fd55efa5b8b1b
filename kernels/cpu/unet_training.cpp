// Forward and backward of the tutorial's U-Net in training (the twin of fastsde.models.UNet).
//
// With y a layer's sums, (1 + a) y + b what its images' scales and shifts make of them, v the log sigmoid of that, and
// d the gradient of what a letter names:
//
//     g = dv (1 - e^v),   dy = (1 + a) g,   db = sum of g over the pixels,   da = sum of y g
//     dW[tap] = sum of in[pixel + tap]^T dy[pixel] over images and pixels
//     din[pixel] = sum of dy[pixel - tap] W[tap]^T over the taps
//
// Signals are blocked (blocked.h). Every sum has an order that depends only on the shapes, so that no result depends on
// the number of threads.

#include "unet_weights.h"

using namespace fastsde;

namespace {

// Null is what a pass does not need: x's gradient, or those of all others together.
struct Arguments {
    const float* const* weights;
    const float* const* biases;
    const float* films;
    float* const* d_weights;
    float* const* d_biases;
    float* d_films;
    float* d_x;
};

// A panel of sums [images, 16] of a pixel.
struct Panel {
    int64_t block, pixel, panel, images;
    const float* sums;
    int64_t line;   // the part that computes it
    bool is_first;  // whether it is the part's first pixel
};

template <class T>
class Training {
  public:
    Training(const Shapes& shapes, const Arguments& arguments, float* memory, int threads)
        : net_(shapes, memory), trains_(shapes.trains), by_(arguments),
          scratch_(threads, PANELS * PANEL * BLOCK_IMAGES) {
        prefer_huge_pages(memory, net_.floats);
    }

    // Must be called by all threads of a team, as `backward`. With ``is_packed`` the memory has the weights.
    void forward(const float* x, const float* t, bool is_packed, float* out) {
        load_images(x, t);
        if (!is_packed)
            for (const Layer<T>& layer : net_.layers) pack(layer, by_.weights[layer.number]);
        barrier_.wait();
        for (const Layer<T>& layer : net_.layers) {
            if (layer.is_last)
                return to_images(layer.in, layer.inputs, layer.forward, layer.outputs, by_.biases[layer.number], out);
            if (layer.pools) {
                pool(layer);
                barrier_.wait();
            }
            forward(layer);
            barrier_.wait();
        }
    }

    void backward(const float* d_out) {
        load_gradients(d_out);
        barrier_.wait();
        for (int64_t number = (int64_t)net_.layers.size() - 1; number >= 0; number--) {
            const Layer<T>& layer = net_.layers[number];
            if (number) backward_signal(layer);
            if (trains_) backward_weights(net_.blocks, layer);
            barrier_.wait();
        }
        const Layer<T>& first = net_.layers[0];
        if (by_.d_x) to_images(first.d_out, first.outputs, first.backward, first.inputs - 1, nullptr, by_.d_x);
        if (!trains_) return;
        for (const Layer<T>& layer : net_.layers) {
            unpack_weights(layer, by_.d_weights[layer.number]);
            layer.is_last ? sum_last_bias(layer, d_out) : unpack_totals(layer);
        }
    }

  private:
    static constexpr int64_t PER_WORD = KindOf<T>::PER_WORD;

    // Sums over the taps and channels that reach each pixel of ``to``, the columns of which are ``all`` channels, and
    // calls finish for each panel of these sums. Before, fetch(block, pixel, panel) may prefetch what that reads.
    template <class Fetch, class Finish>
    void convolve(Map map, const Signal<T>& from, int64_t channels, const float* weights, const Signal<T>& to,
                  int64_t all, Fetch fetch, Finish finish) {
        const Lines lines(to.height, to.width);
        const int64_t blocks = net_.blocks.count, groups = Columns::groups(all), words = ceil_div(channels, PER_WORD);
        // A part has all columns if their weights stay in the second-level cache, so that the input is read once.
        const int64_t of_part = 9 * words * all <= CACHED_WORDS ? groups : 1, parts = blocks * lines.count;
        float* sums = scratch_.mine();
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < groups / of_part * parts; part++) {
            const int64_t block = part / lines.count % blocks, line = part % lines.count;
            const int64_t first = line * lines.each * to.width, images = net_.blocks.images(block);
            for (int64_t pixel = first; pixel < std::min(first + lines.each * to.width, to.pixels()); pixel++) {
                fetch_next(map, from, channels, block, pixel / to.width, pixel % to.width);
                for (int64_t group = part / parts * of_part; group < (part / parts + 1) * of_part; group++) {
                    const Columns columns(group, all, words);
                    for (int64_t p = 0; p < columns.panels; p++) fetch(block, pixel, columns.panel + p);
                    Segment segments[9 * MAX_PANELS];
                    const int64_t count = reach(map, from, channels, weights, columns, block, pixel / to.width,
                                                pixel % to.width, segments);
                    if (columns.panels == 1)
                        multiply_segments<T, 1>(segments, count, images, to.each, sums);
                    else
                        multiply_segments<T, PANELS>(segments, count, images, to.each, sums);
                    for (int64_t p = 0; p < columns.panels; p++)
                        finish(Panel{block, pixel, columns.panel + p, images, sums + p * to.each * PANEL, line,
                                     pixel == first});
                }
            }
        }
    }

    // Prefetches the pixels that reach the pixel to the right of (y, x) but none above or before it.
    static void fetch_next(Map map, const Signal<T>& from, int64_t channels, int64_t block, int64_t y, int64_t x) {
        for (int64_t i = furthest(map, y - 1, from.height) + 1; i <= furthest(map, y, from.height); i++)
            for (int64_t j = furthest(map, x, from.width) + 1; j <= furthest(map, x + 1, from.width); j++)
                from.prefetch(block, i * from.width + j, 0, ceil_div(channels, PANEL));
    }

    static int64_t reach(Map map, const Signal<T>& from, int64_t channels, const float* weights, const Columns& columns,
                         int64_t block, int64_t y, int64_t x, Segment* segments) {
        const int64_t words = ceil_div(channels, PER_WORD), of_panel = PANEL / PER_WORD;
        int64_t count = 0;
        for (int64_t ky = 0; ky < 3; ky++)
            for (int64_t kx = 0; kx < 3; kx++) {
                const int64_t from_y = source(map, y, ky, from.height), from_x = source(map, x, kx, from.width);
                if (from_y < 0 || from_x < 0) continue;
                const float* a = (const float*)from.at(block, from_y * from.width + from_x, 0);
                const float* b = weights + columns.offset + (ky * 3 + kx) * words * columns.width();
                for (int64_t word = 0; word < words; word += of_panel)
                    segments[count++] = Segment{a + word * from.each, b + word * columns.width(),
                                                std::min(of_panel, words - word)};
            }
        return count;
    }

    void forward(const Layer<T>& layer) {
        const bool modulates = by_.films != nullptr, keeps = layer.sums.data != nullptr;
        const auto fetch = [&](int64_t block, int64_t pixel, int64_t panel) {
            layer.out.prefetch(block, pixel, panel);
            if (keeps) layer.sums.prefetch(block, pixel, panel);
        };
        const auto finish = [&](const Panel& of) {
            const float* bias = by_.biases[layer.number] + of.panel * PANEL;
            float* kept = keeps ? layer.sums.at(of.block, of.pixel, of.panel) : nullptr;
            layer.out.write(of.block, of.pixel, of.panel, of.images, [&](int64_t image, int64_t c) {
                Floats sum = load(of.sums + image * PANEL + c) + load(bias + c), value, slope;
                if (modulates) {
                    const float* film = film_of(layer, of, image);
                    if (keeps) store(kept + image * PANEL + c, sum);
                    sum = sum * (1.0f + load(film + c)) + load(film + layer.outputs + c);
                }
                activate<LOG_SIGMOID>(sum, 1.0f, value, slope);
                return value;
            });
        };
        convolve(layer.map, layer.in, layer.inputs, layer.forward, layer.out, layer.outputs, fetch, finish);
    }

    // The scales of a panel's channels for an image, ``outputs`` before their shifts; only if there are any.
    const float* film_of(const Layer<T>& layer, const Panel& of, int64_t image) const {
        return by_.films + (of.block * net_.blocks.each + image) * net_.widths + layer.film + of.panel * PANEL;
    }

    // The largest of 2 x 2 pixels. NaN propagates.
    void pool(const Layer<T>& layer) {
        const Signal<T>&from = layer.before, &to = layer.in;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < net_.blocks.count * to.pixels(); i++) {
            const int64_t block = i / to.pixels(), pixel = i % to.pixels();
            const Window window(from.height, from.width, pixel / to.width, pixel % to.width);
            for (int64_t panel = 0; panel < to.panels; panel++) {
                const T* pixels[4];
                for (int64_t j = 0; j < window.count; j++) pixels[j] = from.at(block, window.pixels[j], panel);
                to.write(block, pixel, panel, net_.blocks.images(block), [&](int64_t image, int64_t c) {
                    Floats most = load_as(pixels[0] + image * PANEL + c);
                    for (int64_t j = 1; j < window.count; j++) {
                        const Floats next = load_as(pixels[j] + image * PANEL + c);
                        most = (next > most) | (next != next) ? next : most;
                    }
                    return most;
                });
            }
        }
    }

    // A convolution of ``inputs`` channels to the few of images, with weights [channels, 9, inputs]: the last one, and
    // the first one transposed, without a bias.
    void to_images(const Signal<T>& in, int64_t inputs, const float* packed, int64_t channels, const float* bias,
                   float* out) {
        const int64_t pixels = in.pixels();
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < net_.blocks.count * pixels; i++) {
            const int64_t block = i / pixels, pixel = i % pixels, y = pixel / in.width, x = pixel % in.width;
            for (int64_t channel = 0; channel < channels; channel++)
                for (int64_t image = 0; image < net_.blocks.images(block); image += 4) {
                    const int64_t here = std::min<int64_t>(4, net_.blocks.images(block) - image);
                    Floats sums[4]{};
                    for (int64_t tap = 0; tap < 9; tap++) {
                        const int64_t from_y = y + tap / 3 - 1, from_x = x + tap % 3 - 1;
                        if (from_y < 0 || from_y >= in.height || from_x < 0 || from_x >= in.width) continue;
                        const T* from = in.at(block, from_y * in.width + from_x, 0) + image * PANEL;
                        dots(from, packed + (channel * 9 + tap) * inputs, inputs, in.each * PANEL, here, sums);
                    }
                    const int64_t of_batch = block * net_.blocks.each + image;
                    for (int64_t k = 0; k < here; k++)
                        out[((of_batch + k) * channels + channel) * pixels + pixel] =
                            sum_of(sums[k]) + (bias ? bias[channel] : 0.0f);
                }
        }
    }

    static void dots(const T* from, const float* weights, int64_t channels, int64_t panel, int64_t images,
                     Floats* sums) {
        for (int64_t c = 0; c < channels; c += LANES) {
            const T* at = from + c / PANEL * panel + c % PANEL;
            const Floats weight = load(weights + c);
            if (images == 4)
                for (int k = 0; k < 4; k++) sums[k] += load_as(at + k * PANEL) * weight;
            else
                for (int64_t k = 0; k < images; k++) sums[k] += load_as(at + k * PANEL) * weight;
        }
    }

    // Writes the gradient of the input of a layer, as that of the layer behind, as far as it is complete.
    void backward_signal(const Layer<T>& layer) {
        const Layer<T>& behind = net_.layers[layer.behind];
        const Signal<T>& to = layer.pools ? layer.in : layer.d_in;
        const auto fetch = [&](int64_t block, int64_t pixel, int64_t panel) {
            if (!layer.pools) {
                layer.d_in.prefetch(block, pixel, panel);
                if (panel < layer.own) layer.in.prefetch(block, pixel, panel);
                return;
            }
            const Window window(layer.before.height, layer.before.width, pixel / to.width, pixel % to.width);
            for (int64_t j = 0; j < window.count; j++) {
                layer.before.prefetch(block, window.pixels[j], panel);
                layer.d_before.prefetch(block, window.pixels[j], panel);
            }
        };
        convolve(transposed(layer.map), layer.d_out, layer.outputs, layer.backward, to, layer.inputs, fetch,
                 [&](const Panel& of) {
                     if (layer.pools) return unpool(layer, behind, of);
                     if (of.panel >= layer.own) return keep(layer.d_in, of);  // until the pool's is added
                     const T* values = layer.in.at(of.block, of.pixel, of.panel);
                     complete(behind, of, [&](int64_t at) {
                         return load(of.sums + at) * slope_at(load_as(values + at));
                     });
                 });
    }

    void keep(const Signal<T>& to, const Panel& of) {
        T* data = to.at(of.block, of.pixel, of.panel);
        for (int64_t at = 0; at < of.images * PANEL; at += LANES) store_as(data + at, load(of.sums + at));
    }

    // Adds a pooled pixel's gradient to that of the first largest of its pixels, as PyTorch does.
    void unpool(const Layer<T>& layer, const Layer<T>& behind, const Panel& of) {
        const Signal<T>& before = layer.before;
        const Window window(before.height, before.width, of.pixel / layer.in.width, of.pixel % layer.in.width);
        const T* pixels[4];
        for (int64_t j = 0; j < window.count; j++) pixels[j] = before.at(of.block, window.pixels[j], of.panel);
        Ints which[BLOCK_IMAGES * VECTORS];
        for (int64_t at = 0; at < of.images * PANEL; at += LANES) {
            Floats most = load_as(pixels[0] + at);
            Ints chosen{};
            for (int32_t j = 1; j < window.count; j++) {
                const Floats next = load_as(pixels[j] + at);
                const Ints larger = (next > most) | (next != next);
                most = larger ? next : most, chosen = larger ? Ints{} + j : chosen;
            }
            which[at / LANES] = chosen;
        }
        for (int32_t j = 0; j < window.count; j++) {
            const T* others = layer.d_before.at(of.block, window.pixels[j], of.panel);
            Panel to = of;
            to.pixel = window.pixels[j], to.is_first = of.is_first && j == 0;
            complete(behind, to, [&](int64_t at) {
                const Floats own = which[at / LANES] == j ? load(of.sums + at) : Floats{};
                return (load_as(others + at) + own) * slope_at(load_as(pixels[j] + at));
            });
        }
    }

    // Writes the gradient of a layer's sums from g, a function of the place in a panel, and adds to the totals.
    template <class Gradient>
    void complete(const Layer<T>& layer, const Panel& of, Gradient gradient) {
        const bool modulates = by_.films != nullptr, trains = trains_;
        float* shifts = trains ? net_.totals(layer, of.line, of.block, of.panel) : nullptr;
        float* scales = trains ? shifts + net_.blocks.each * PANEL : nullptr;
        const float* sums = modulates && trains ? layer.sums.at(of.block, of.pixel, of.panel) : nullptr;
        const auto add = [&](float* total, Floats term) { store(total, of.is_first ? term : load(total) + term); };
        layer.d_out.write(of.block, of.pixel, of.panel, of.images, [&](int64_t image, int64_t c) {
            const int64_t at = image * PANEL + c;
            const Floats g = gradient(at);
            if (trains) add(shifts + at, g);
            if (!modulates) return g;
            if (trains) add(scales + at, g * load(sums + at));
            return g * (1.0f + load(film_of(layer, of, image) + c));
        });
    }

    // x [batch, channels, height, width] with the time as one more channel.
    void load_images(const float* x, const float* t) {
        const int64_t channels = net_.layers[0].inputs - 1, pixels = net_.layers[0].in.pixels();
        load_signal(net_.layers[0].in, [=](int64_t image, int64_t pixel, int64_t c) {
            return c < channels ? x[(image * channels + c) * pixels + pixel] : c == channels ? t[image] : 0.0f;
        });
    }

    void load_gradients(const float* d_out) {
        const Layer<T>& layer = net_.layers.back();
        const int64_t channels = layer.outputs, pixels = layer.d_out.pixels();
        load_signal(layer.d_out, [=](int64_t image, int64_t pixel, int64_t c) {
            return c < channels ? d_out[(image * channels + c) * pixels + pixel] : 0.0f;
        });
    }

    // Writes value(image, pixel, channel) for all channels of all panels.
    template <class Value>
    void load_signal(const Signal<T>& to, Value value) {
        const int64_t of_block = to.pixels() * to.panels;
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < net_.blocks.count * of_block; part++) {
            const int64_t block = part / of_block, pixel = part % of_block / to.panels, panel = part % to.panels;
            to.write(block, pixel, panel, net_.blocks.images(block), [&](int64_t image, int64_t c) {
                float lanes[LANES];
                for (int64_t k = 0; k < LANES; k++)
                    lanes[k] = value(block * net_.blocks.each + image, pixel, panel * PANEL + c + k);
                return load(lanes);
            });
        }
    }

    // Writes the gradients of scales, shifts and bias.
    void unpack_totals(const Layer<T>& layer) {
#pragma omp for schedule(static) nowait
        for (int64_t panel = 0; panel < layer.outputs / PANEL; panel++) {
            double bias[PANEL]{};
            for (int64_t image = 0; image < net_.blocks.batch; image++) {
                const int64_t each = net_.blocks.each, block = image / each, at = image % each * PANEL;
                float shifts[PANEL]{}, scales[PANEL]{};
                for (int64_t line = 0; line < layer.totals_lines; line++) {
                    const float* totals = net_.totals(layer, line, block, panel) + at;
                    for (int64_t c = 0; c < PANEL; c++) shifts[c] += totals[c];
                    for (int64_t c = 0; by_.films && c < PANEL; c++) scales[c] += totals[each * PANEL + c];
                }
                const int64_t film = image * net_.widths + layer.film + panel * PANEL;
                for (int64_t c = 0; c < PANEL; c++) {
                    bias[c] += by_.films ? shifts[c] * (1.0 + by_.films[film + c]) : shifts[c];
                    if (by_.films) by_.d_films[film + c] = scales[c], by_.d_films[film + layer.outputs + c] = shifts[c];
                }
            }
            for (int64_t c = 0; c < PANEL; c++) by_.d_biases[layer.number][panel * PANEL + c] = (float)bias[c];
        }
    }

    void sum_last_bias(const Layer<T>& layer, const float* d_out) {
        const int64_t pixels = layer.in.pixels();
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < layer.outputs; c++) {
            double total = 0;
            for (int64_t image = 0; image < net_.blocks.batch; image++)
                for (int64_t pixel = 0; pixel < pixels; pixel++)
                    total += d_out[(image * layer.outputs + c) * pixels + pixel];
            by_.d_biases[layer.number][c] = (float)total;
        }
    }

    const Network<T> net_;
    const bool trains_;
    const Arguments by_;
    PerThread<Buffer> scratch_;
    Barrier barrier_;
};

// Calls body with an element of the signals' type.
template <class Body>
auto with_elements(bool bf16, Body body) {
#if defined(FASTSDE_BF16)
    if (bf16) return body(Half());
#endif
    (void)bf16;
    return body(float());
}

}  // namespace

// Returns whether the kernel has bf16.
extern "C" int fastsde_unet_training_has_bf16(int) {
#if defined(FASTSDE_BF16)
    return 1;
#else
    return 0;
#endif
}

// The floats of memory that forward and backward share.
extern "C" int64_t fastsde_unet_training_floats(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                                int64_t levels, const int64_t* channels, int bf16, int modulates,
                                                int trains, int) {
    const Shapes shapes{batch, image_channels, height, width, levels, channels, modulates != 0, trains != 0};
    return with_elements(bf16, [&](auto element) { return Network<decltype(element)>(shapes, nullptr).floats; });
}

// x and out [batch, image_channels, height, width], t [batch], films [batch, widths], for each layer but the last 2 *
// out values, or null. weights and biases hold one array per layer (encoder, decoder, head), as PyTorch has them, all
// fp32. With ``bf16``, signals are bf16 and weights are rounded to it; those of the last layer, and of the first one
// for the gradient of x, are not. ``trains`` tells whether the backward pass will write the gradients of weights, and
// ``is_packed`` that the memory, of an earlier pass of as many images, has these weights.
extern "C" int fastsde_unet_training_forward(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                             int64_t levels, const int64_t* channels, int bf16, int trains,
                                             int is_packed, const float* const* weights, const float* const* biases,
                                             const float* x, const float* t, const float* films, float* memory,
                                             float* out, int threads) {
    const Shapes shapes{batch, image_channels, height, width, levels, channels, films != nullptr, trains != 0};
    const Arguments arguments{weights, biases, films, nullptr, nullptr, nullptr, nullptr};
    return with_status([&] {
        with_elements(bf16, [&](auto element) {
            Training<decltype(element)> training(shapes, arguments, memory, threads);
            run_team(threads, [&] { training.forward(x, t, is_packed != 0, out); });
        });
    });
}

// Writes the gradients, after a forward in the same memory, once or more often. d_out and d_x as out, d_films as films.
// d_x may be null; d_weights, d_biases and d_films are null together, after a forward that does not train.
extern "C" int fastsde_unet_training_backward(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                              int64_t levels, const int64_t* channels, int bf16, const float* films,
                                              const float* d_out, float* memory, float* const* d_weights,
                                              float* const* d_biases, float* d_films, float* d_x, int threads) {
    const bool trains = d_weights != nullptr;
    const Shapes shapes{batch, image_channels, height, width, levels, channels, films != nullptr, trains};
    const Arguments arguments{nullptr, nullptr, films, d_weights, d_biases, d_films, d_x};
    return with_status([&] {
        with_elements(bf16, [&](auto element) {
            Training<decltype(element)> training(shapes, arguments, memory, threads);
            run_team(threads, [&] { training.backward(d_out); });
        });
    });
}
