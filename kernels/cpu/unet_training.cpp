// Forward and backward of the tutorial's U-Net in training (the twin of fastsde.models.UNet).
//
// With y a layer's sums, (1 + a) y + b what its images' scales and shifts make of them, v = log sigmoid of that, and d
// the gradient of what a letter names:
//
//     dy = (1 + a) dv (1 - e^v),   db = sum over pixels of dv (1 - e^v),   da = that of y dv (1 - e^v)
//     dW[tap] = sum over images and pixels of in[pixel + tap]^T dy[pixel],   din[pixel] = sum of dy[pixel - tap] W[tap]^T
//
// Signals are blocked (blocked.h). Every sum has an order that depends only on the shapes, so that no result depends on
// the number of threads.

#include "unet_training.h"

using namespace fastsde;

namespace {

class Training {
  public:
    Training(const Shapes& shapes, const Arguments& arguments, float* memory, int threads)
        : net_(shapes, memory), by_(arguments), scratch_(threads, 2 * PANELS * PANEL * BLOCK_IMAGES) {}

    // Must be called by all threads of a team, as `backward`.
    void forward(const float* x, const float* t, float* out) {
        load_images(x, t);
        for (const Layer& layer : net_.layers) pack(layer, by_.weights[layer.number]);
        barrier_.wait();
        for (const Layer& layer : net_.layers) {
            if (layer.pools) {
                pool(layer);
                barrier_.wait();
            }
            if (layer.is_last) {
                last(layer, out);
                continue;
            }
            forward(layer);
            barrier_.wait();
        }
    }

    void backward(const float* d_out) {
        load_gradients(d_out);
        barrier_.wait();
        for (int64_t number = (int64_t)net_.layers.size() - 1; number >= 0; number--) {
            const Layer& layer = net_.layers[number];
            sum_gradients(layer);
            barrier_.wait();
            if (number) backward_signal(layer);
            backward_weights(layer);
            barrier_.wait();
        }
        for (const Layer& layer : net_.layers) unpack(layer);
    }

  private:
    // Sums over the taps and channels that reach each pixel of ``to``, the columns of which are ``all`` channels, and
    // calls finish(block, pixel, panel, sums) for each panel of these sums [images, 16].
    template <class Finish>
    void convolve(Map map, const Blocked& from, int64_t channels, const float* weights, const Blocked& to, int64_t all,
                  Finish finish) {
        const int64_t rows = std::min(to.height, ceil_div(8, to.width)), lines = ceil_div(to.height, rows);
        const int64_t blocks = net_.blocks.count, groups = Columns::groups(all);
        float* sums = scratch_.mine();
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < groups * blocks * lines; part++) {
            const Columns columns(part / (blocks * lines), all, channels);
            const int64_t block = part / lines % blocks, first = part % lines * rows * to.width;
            const int64_t end = std::min(first + rows * to.width, to.pixels()), images = net_.blocks.images(block);
            for (int64_t pixel = first; pixel < end; pixel++) {
                Segment segments[9 * MAX_PANELS];
                const int64_t count = reach(map, from, channels, weights + columns.offset, columns, block,
                                            pixel / to.width, pixel % to.width, segments);
                if (columns.panels == 1)
                    multiply_segments<1>(segments, count, images, to.each, sums);
                else
                    multiply_segments<PANELS>(segments, count, images, to.each, sums);
                for (int64_t p = 0; p < columns.panels; p++)
                    finish(block, pixel, columns.panel + p, sums + p * to.each * PANEL);
            }
        }
    }

    __attribute__((noinline)) static int64_t reach(Map map, const Blocked& from, int64_t channels, const float* weights, const Columns& columns,
                         int64_t block, int64_t y, int64_t x, Segment* segments) {
        int64_t count = 0;
        for (int64_t ky = 0; ky < 3; ky++)
            for (int64_t kx = 0; kx < 3; kx++) {
                const int64_t from_y = source(map, y, ky, from.height), from_x = source(map, x, kx, from.width);
                if (from_y < 0 || from_x < 0) continue;
                const float* a = from.at(block, from_y * from.width + from_x, 0);
                for (int64_t c = 0; c < channels; c += PANEL) {
                    const float* b = weights + ((ky * 3 + kx) * channels + c) * columns.width();
                    segments[count++] = Segment{a + c * from.each, b, std::min(PANEL, channels - c)};
                }
            }
        return count;
    }

    void forward(const Layer& layer) {
        const float* bias = by_.biases[layer.number];
        const bool modulates = by_.films != nullptr;
        convolve(layer.map, layer.in, layer.inputs, layer.forward, layer.out, layer.outputs,
                 [&](int64_t block, int64_t pixel, int64_t panel, const float* sums) {
                     float* out = layer.out.at(block, pixel, panel);
                     float* kept = modulates ? layer.sums.at(block, pixel, panel) : nullptr;
                     for (int64_t i = 0; i < net_.blocks.images(block); i++) {
                         const float* film = film_of(layer, block, i, panel);
                         for (int64_t c = 0; c < PANEL; c += LANES) {
                             Floats sum = load(sums + i * PANEL + c) + load(bias + panel * PANEL + c), value, slope;
                             if (modulates) {
                                 store(kept + i * PANEL + c, sum);
                                 sum = sum * (1.0f + load(film + c)) + load(film + layer.outputs + c);
                             }
                             activate<LOG_SIGMOID>(sum, 1.0f, value, slope);
                             store(out + i * PANEL + c, value);
                         }
                     }
                 });
    }

    // The scales of a panel's channels for an image, ``outputs`` before their shifts; only if there are any.
    const float* film_of(const Layer& layer, int64_t block, int64_t image, int64_t panel) const {
        return by_.films + (block * net_.blocks.each + image) * net_.widths + layer.film + panel * PANEL;
    }

    // The largest of 2 x 2 pixels; with an odd size the first row or column is on its own. NaN propagates.
    __attribute__((noinline)) void pool(const Layer& layer) {
        const Blocked &from = layer.before, &to = layer.in;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < net_.blocks.count * to.pixels(); i++) {
            const int64_t block = i / to.pixels(), pixel = i % to.pixels();
            const Window window(from, pixel / to.width, pixel % to.width);
            for (int64_t panel = 0; panel < to.panels; panel++) {
                float* out = to.at(block, pixel, panel);
                for (int64_t at = 0; at < net_.blocks.images(block) * PANEL; at += LANES) {
                    Floats most = load(from.at(block, window.pixels[0], panel) + at);
                    for (int64_t j = 1; j < window.count; j++) {
                        const Floats next = load(from.at(block, window.pixels[j], panel) + at);
                        most = (next > most) | (next != next) ? next : most;
                    }
                    store(out + at, most);
                }
            }
        }
    }

    // The last convolution, to few channels, without an activation: weights [outputs, 9, inputs].
    __attribute__((noinline)) void last(const Layer& layer, float* out) {
        const Blocked& in = layer.in;
        const int64_t pixels = in.pixels();
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < net_.blocks.count * pixels; i++) {
            const int64_t block = i / pixels, pixel = i % pixels, y = pixel / in.width, x = pixel % in.width;
            for (int64_t channel = 0; channel < layer.outputs; channel++)
                for (int64_t image = 0; image < net_.blocks.images(block); image += 4) {
                    const int64_t here = std::min<int64_t>(4, net_.blocks.images(block) - image);
                    Floats sums[4]{};
                    for (int64_t ky = std::max<int64_t>(0, 1 - y); ky < std::min<int64_t>(3, in.height + 1 - y); ky++)
                        for (int64_t kx = std::max<int64_t>(0, 1 - x); kx < std::min<int64_t>(3, in.width + 1 - x); kx++) {
                            const float* from = in.at(block, pixel + (ky - 1) * in.width + kx - 1, 0) + image * PANEL;
                            const float* w = layer.forward + (channel * 9 + ky * 3 + kx) * layer.inputs;
                            dots(from, w, layer.inputs, in.each * PANEL, here, sums);
                        }
                    const int64_t of_batch = block * net_.blocks.each + image;
                    for (int64_t i = 0; i < here; i++)
                        out[((of_batch + i) * layer.outputs + channel) * pixels + pixel] =
                            sum_of(sums[i]) + by_.biases[layer.number][channel];
                }
        }
    }

    static void dots(const float* from, const float* w, int64_t channels, int64_t per_panel, int64_t images,
                     Floats* sums) {
        for (int64_t c = 0; c < channels; c += LANES) {
            const float* at = from + c / PANEL * per_panel + c % PANEL;
            const Floats weights = load(w + c);
            if (images == 4)
                for (int i = 0; i < 4; i++) sums[i] += load(at + i * PANEL) * weights;
            else
                for (int64_t i = 0; i < images; i++) sums[i] += load(at + i * PANEL) * weights;
        }
    }

    // Makes dv (1 - e^v) the gradient of the sums, and sums both over the pixels of each image.
    __attribute__((noinline)) void sum_gradients(const Layer& layer) {
        const Blocked& d = layer.d_out;
        const bool modulates = by_.films && !layer.is_last;
        const int64_t panels = ceil_div(layer.outputs, PANEL);
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < net_.blocks.count * panels; part++) {
            const int64_t block = part / panels, panel = part % panels, images = net_.blocks.images(block);
            float* shifts = net_.sums_of(layer, block, panel);
            float* scales = shifts + net_.blocks.each * PANEL;
            std::fill_n(shifts, 2 * net_.blocks.each * PANEL, 0.0f);
            for (int64_t pixel = 0; pixel < d.pixels(); pixel++) {
                float* gradient = d.at(block, pixel, panel);
                for (int64_t at = 0; at < images * PANEL; at += LANES) {
                    const Floats g = load(gradient + at);
                    store(shifts + at, load(shifts + at) + g);
                    if (!modulates) continue;
                    store(scales + at, load(scales + at) + g * load(layer.sums.at(block, pixel, panel) + at));
                    const float* film = film_of(layer, block, at / PANEL, panel) + at % PANEL;
                    store(gradient + at, g * (1.0f + load(film)));
                }
            }
        }
    }

    // Writes the gradient of the layer's input, times the derivative of its activation.
    void backward_signal(const Layer& layer) {
        const Map map = transposed(layer.map);
        const auto over = [&](auto finish) {
            convolve(map, layer.d_out, layer.outputs, layer.backward, layer.pools ? layer.in : layer.d_in, layer.inputs,
                     finish);
        };
        if (layer.pools)
            return over([&](int64_t block, int64_t pixel, int64_t panel, const float* sums) {
                unpool(layer, block, pixel, panel, sums);
            });
        over([&](int64_t block, int64_t pixel, int64_t panel, const float* sums) {
            const float* value = layer.in.at(block, pixel, panel);
            float* to = layer.d_in.at(block, pixel, panel);
            const bool waits = panel >= layer.own_panels;  // for the gradient by way of the pool
            for (int64_t at = 0; at < net_.blocks.images(block) * PANEL; at += LANES) {
                const Floats sum = load(sums + at);
                store(to + at, waits ? sum : sum * slope_at(load(value + at)));
            }
        });
    }

    // Adds a pooled pixel's gradient to that of the first largest of its pixels, as PyTorch does.
    __attribute__((noinline)) void unpool(const Layer& layer, int64_t block, int64_t pixel, int64_t panel, const float* sums) {
        const Window window(layer.before, pixel / layer.in.width, pixel % layer.in.width);
        for (int64_t at = 0; at < net_.blocks.images(block) * PANEL; at += LANES) {
            Floats values[4];
            Ints which{};
            Floats most = values[0] = load(layer.before.at(block, window.pixels[0], panel) + at);
            for (int32_t j = 1; j < window.count; j++) {
                const Floats next = values[j] = load(layer.before.at(block, window.pixels[j], panel) + at);
                const Ints larger = (next > most) | (next != next);
                most = larger ? next : most, which = larger ? Ints{} + j : which;
            }
            const Floats sum = load(sums + at);
            for (int32_t j = 0; j < window.count; j++) {
                float* to = layer.d_before.at(block, window.pixels[j], panel) + at;
                store(to, (load(to) + (which == j ? sum : Floats{})) * slope_at(values[j]));
            }
        }
    }

    // Sums the gradient of the weights over all images and pixels, in slots that are added later.
    __attribute__((noinline)) void backward_weights(const Layer& layer) {
        const Outer& outer = layer.outer;
        const int64_t groups = Columns::groups(outer.columns), row_parts = ceil_div(outer.rows, ROWS_EACH);
        const int64_t lines = net_.blocks.count * outer.height, tiles = groups * row_parts;
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < layer.slots * tiles; part++) {
            const int64_t slot = part / tiles, first_row = part % row_parts * ROWS_EACH;
            const int64_t rows = std::min(ROWS_EACH, outer.rows - first_row);
            const Columns columns(part % tiles / row_parts, outer.columns, outer.rows);
            float* to = layer.gradient + slot * layer.weights_size + columns.offset + first_row * columns.width();
            for (int64_t tap = 0; tap < 9; tap++)
                std::fill_n(to + tap * outer.rows * columns.width(), rows * columns.width(), 0.0f);
            for (int64_t line = slot * lines / layer.slots; line < (slot + 1) * lines / layer.slots; line++)
                for (int64_t x = 0; x < outer.width; x += RUN_PIXELS)
                    add_run(outer, columns, line / outer.height, line % outer.height, x,
                            std::min(x + RUN_PIXELS, outer.width), first_row, rows, to);
        }
    }

    __attribute__((noinline)) void add_run(const Outer& by, const Columns& columns, int64_t block, int64_t y, int64_t first, int64_t end,
                 int64_t first_row, int64_t rows, float* to) {
        const Blocked &a = by.a, &b = by.b;
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t a_y = y + by.a_moves * (tap / 3 - 1), b_y = by.b_stride * y + by.b_moves * (tap / 3 - 1);
            if (a_y < 0 || a_y >= a.height || b_y < 0 || b_y >= b.height) continue;
            const int64_t a_by = by.a_moves * (tap % 3 - 1), b_by = by.b_moves * (tap % 3 - 1);
            int64_t x = first, last = end - 1;
            while (x <= last && (x + a_by < 0 || by.b_stride * x + b_by < 0)) x++;
            while (last >= x && (last + a_by >= a.width || by.b_stride * last + b_by >= b.width)) last--;
            if (x > last) continue;
            Run run{nullptr, b.at(block, b_y * b.width + by.b_stride * x + b_by, columns.panel), a.per_pixel(),
                    by.b_stride * b.per_pixel(), b.each * PANEL, last + 1 - x, net_.blocks.images(block)};
            for (int64_t row = 0; row < rows; row += PANEL) {
                run.a = a.at(block, a_y * a.width + x + a_by, (first_row + row) / PANEL);
                float* c = to + (tap * by.rows + row) * columns.width();
                if (columns.panels == 1)
                    multiply_run<1>(run, std::min(PANEL, rows - row), c);
                else
                    multiply_run<PANELS>(run, std::min(PANEL, rows - row), c);
            }
        }
    }

    // x [batch, channels, height, width] with the time as one more channel.
    __attribute__((noinline)) void load_images(const float* x, const float* t) {
        const int64_t channels = net_.layers[0].inputs - 1, pixels = net_.layers[0].in.pixels();
        load_signal(net_.layers[0].in, [=](int64_t image, int64_t pixel, int64_t c) {
            return c < channels ? x[(image * channels + c) * pixels + pixel] : c == channels ? t[image] : 0.0f;
        });
    }

    __attribute__((noinline)) void load_gradients(const float* d_out) {
        const Layer& layer = net_.layers.back();
        const int64_t channels = layer.outputs, pixels = layer.d_out.pixels();
        load_signal(layer.d_out, [=](int64_t image, int64_t pixel, int64_t c) {
            return c < channels ? d_out[(image * channels + c) * pixels + pixel] : 0.0f;
        });
    }

    // Writes value(image, pixel, channel) for all channels of all panels.
    template <class Value>
    void load_signal(const Blocked& to, Value value) {
        const int64_t of_block = to.pixels() * to.panels;
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < net_.blocks.count * of_block; part++) {
            const int64_t block = part / of_block, pixel = part % of_block / to.panels, panel = part % to.panels;
            float* at = to.at(block, pixel, panel);
            for (int64_t i = 0; i < net_.blocks.images(block); i++)
                for (int64_t c = 0; c < PANEL; c++)
                    at[i * PANEL + c] = value(block * net_.blocks.each + i, pixel, panel * PANEL + c);
        }
    }

    // Runs body(where in PyTorch's weights, where in [9, rows, columns]) for all weights, in runs of a row of columns.
    template <class Body>
    void for_weights(const Form& form, Body body) {
        const int64_t groups = Columns::groups(form.columns), row_parts = ceil_div(form.rows, PANEL);
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < groups * row_parts; part++) {
            const Columns columns(part / row_parts, form.columns, form.rows);
            const int64_t first = part % row_parts * PANEL, width = columns.width();
            for (int64_t row = first; row < std::min(first + PANEL, form.rows); row++)
                body(row * form.row_stride + columns.panel * PANEL * form.column_stride, form.column_stride,
                     columns.offset + row * width, form.rows * width, width);
        }
    }

    __attribute__((noinline)) void pack(const Layer& layer, const float* weights) {
        const auto into = [&](float* to) {
            return [=](int64_t from, int64_t stride, int64_t at, int64_t per_tap, int64_t width) {
                for (int64_t c = 0; c < width; c++)
                    for (int64_t tap = 0; tap < 9; tap++) to[at + tap * per_tap + c] = weights[from + c * stride + tap];
            };
        };
        if (layer.number) for_weights(layer.backward_form, into(layer.backward));
        if (!layer.is_last) return for_weights(layer.forward_form, into(layer.forward));
#pragma omp for schedule(static) nowait
        for (int64_t channel = 0; channel < layer.outputs; channel++)
            for (int64_t c = 0; c < layer.inputs; c++)
                for (int64_t tap = 0; tap < 9; tap++)
                    layer.forward[(channel * 9 + tap) * layer.inputs + c] =
                        weights[(channel * layer.inputs + c) * 9 + tap];
    }

    // Adds the slots of the gradient, and the sums of all images.
    __attribute__((noinline)) void unpack(const Layer& layer) {
        float* weights = by_.d_weights[layer.number];
        for_weights(layer.is_last ? layer.backward_form : layer.forward_form,
                    [&](int64_t to, int64_t stride, int64_t at, int64_t per_tap, int64_t width) {
                        for (int64_t tap = 0; tap < 9; tap++) {
                            float* first = layer.gradient + at + tap * per_tap;
                            for (int64_t slot = 1; slot < layer.slots; slot++)
                                for (int64_t c = 0; c < width; c++) first[c] += first[slot * layer.weights_size + c];
                            for (int64_t c = 0; c < width; c++) weights[to + c * stride + tap] = first[c];
                        }
                    });
        const bool modulates = by_.films && !layer.is_last;
        float* bias = by_.d_biases[layer.number];
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < layer.outputs; c++) {
            float total = 0.0f;
            for (int64_t i = 0; i < net_.blocks.batch; i++) {
                const int64_t each = net_.blocks.each, panel = c / PANEL;
                const float* shift = net_.sums_of(layer, i / each, panel) + i % each * PANEL + c % PANEL;
                total += modulates ? *shift * (1.0f + by_.films[i * net_.widths + layer.film + c]) : *shift;
                if (!modulates) continue;
                float* film = by_.d_films + i * net_.widths + layer.film + c;
                film[0] = shift[each * PANEL], film[layer.outputs] = *shift;
            }
            bias[c] = total;
        }
    }

    const Network net_;
    const Arguments by_;
    PerThread<Buffer> scratch_;
    Barrier barrier_;
};

}  // namespace

// The floats of memory that forward and backward share.
extern "C" int64_t fastsde_unet_training_floats(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                                int64_t levels, const int64_t* channels, int modulates, int) {
    return Network(Shapes{batch, image_channels, height, width, levels, channels, modulates != 0}, nullptr).floats;
}

// x and out [batch, image_channels, height, width], t [batch], films [batch, widths], for each layer but the last 2 *
// out values, or null. weights and biases hold one array per layer (encoder, decoder, head), as PyTorch has them.
extern "C" int fastsde_unet_training_forward(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                             int64_t levels, const int64_t* channels, const float* const* weights,
                                             const float* const* biases, const float* x, const float* t,
                                             const float* films, float* memory, float* out, int threads) {
    return with_status([&] {
        const Shapes shapes{batch, image_channels, height, width, levels, channels, films != nullptr};
        Training training(shapes, Arguments{weights, biases, films, nullptr, nullptr, nullptr}, memory, threads);
        run_team(threads, [&] { training.forward(x, t, out); });
    });
}

// Writes the gradients, after a forward in the same memory. d_out as out, d_films as films, or both null.
extern "C" int fastsde_unet_training_backward(int64_t batch, int64_t image_channels, int64_t height, int64_t width,
                                              int64_t levels, const int64_t* channels, const float* films,
                                              const float* d_out, float* memory, float* const* d_weights,
                                              float* const* d_biases, float* d_films, int threads) {
    return with_status([&] {
        const Shapes shapes{batch, image_channels, height, width, levels, channels, films != nullptr};
        Training training(shapes, Arguments{nullptr, nullptr, films, d_weights, d_biases, d_films}, memory, threads);
        run_team(threads, [&] { training.backward(d_out); });
    });
}
