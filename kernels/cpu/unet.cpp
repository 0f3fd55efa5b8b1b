// The tutorial's U-Net (the twin of fastsde.models.UNet), on the CPU from image to score.
//
// Signals are channels last, in fp32 or bf16. A convolution is a sum over its nine taps of products of pixels
// [pixels, in] and a tap's weights [in, out], accumulated in fp32 in a part of the output that stays in the cache. A
// tap moves only the pixels that it can reach, so that nothing is padded; in a transposed convolution of stride 2 it
// moves them to every second position. The rows of a product are adjacent pixels of an image or, if images are small,
// the same pixel of consecutive images.

#include "activations.h"
#include "elements.h"
#include "memory.h"
#include "parts.h"

using namespace fastsde;

namespace {

constexpr int64_t GROUP = 64;           // output channels per part
constexpr int64_t IMAGES = 12;          // at most, per part
constexpr int64_t PART_FLOATS = 8192;   // per part of one image, about
constexpr int64_t DEPTH_FLOATS = 8192;  // of a tap's weights that are used at once: half a first-level cache

// [images, height, width, stride]; a signal may use only some of a pixel's ``stride`` channels, from at() on.
template <class T>
struct Signal {
    T* data;
    int64_t height, width, stride;

    T* at(int64_t image, int64_t y, int64_t x) const { return data + ((image * height + y) * width + x) * stride; }
};

// weights [9, in, out] fp32, or [9, in / 2, out, 2] bf16; in and out are multiples of 2 and of COLUMNS, or in is 1.
struct Convolution {
    int64_t in, out;
    bool transposed;
    const void* weights;
    const float* bias;
};

// The time's part of the first convolution: t of the image times the plane [height, width, out].
struct Time {
    const float *t, *plane;
};

// The positions i of the input, of ``size``, that a tap moves to i stride + offset within [low, high) of the output.
struct Reach {
    int64_t first, end;

    Reach(int64_t size, int64_t stride, int64_t offset, int64_t low, int64_t high) {
        first = std::max<int64_t>(0, low - offset > 0 ? ceil_div(low - offset, stride) : 0);
        end = high - offset > 0 ? std::min(size, ceil_div(high - offset, stride)) : 0;
    }
};

// Scales and shifts of a layer's channels, by which sums y become (1 + a) y + b: for each image ``out`` scales and then
// ``out`` shifts, ``stride`` apart. None if ``values`` is null.
struct Film {
    const float* values = nullptr;
    int64_t stride = 0;
};

// Computes one part of a convolution's output: some images, rows and channels.
template <class In, class Out>
class PartOfConvolution {
  public:
    PartOfConvolution(const Convolution& by, Signal<const In> in, Signal<Out> out, int64_t first_image, int64_t images,
                      int64_t first_row, int64_t rows, int64_t first_channel, Film film, float* sums)
        : by_(by), film_(film), in_(in), out_(out), first_image_(first_image), images_(images), first_row_(first_row), rows_(rows),
          first_channel_(first_channel), channels_(std::min(GROUP, by.out - first_channel)), sums_(sums) {}

    void run(const Time* time) {
        start(time);
        for (int64_t ky = 0; ky < 3; ky++)
            for (int64_t kx = 0; kx < 3; kx++) tap(ky, kx);
        finish();
    }

  private:
    float* sums(int64_t image, int64_t row, int64_t x) {
        return sums_ + ((image * rows_ + row) * out_.width + x) * channels_;
    }

    void start(const Time* time) {
        const float* bias = by_.bias + first_channel_;
        for (int64_t i = 0; i < images_; i++)
            for (int64_t place = 0; place < rows_ * out_.width; place++)
                for (int64_t c = 0; c < channels_; c += LANES) {
                    Floats sum = load(bias + c);
                    if (time) {
                        const int64_t at = first_row_ * out_.width + place;
                        sum += time->t[first_image_ + i] * load(time->plane + at * by_.out + first_channel_ + c);
                    }
                    store(sums(i, 0, 0) + place * channels_ + c, sum);
                }
    }

    void tap(int64_t ky, int64_t kx) {
        const int64_t stride = by_.transposed ? 2 : 1;
        const int64_t down = by_.transposed ? ky - 1 : 1 - ky, right = by_.transposed ? kx - 1 : 1 - kx;
        const Reach y(in_.height, stride, down, first_row_, first_row_ + rows_);
        const Reach x(in_.width, stride, right, 0, out_.width);
        const int64_t depth = by_.in / PER_WORD, image = in_.height * in_.width * in_.stride / PER_WORD;
        const int64_t deep = std::max<int64_t>(1, DEPTH_FLOATS / channels_);
        const float* weights = (const float*)by_.weights + (ky * 3 + kx) * depth * by_.out + first_channel_;
        const bool across = images_ > x.end - x.first;  // the rows of a product are images
        Product p{nullptr, across ? image : in_.stride / PER_WORD, 1, nullptr, by_.out, nullptr, 0, 0, {}};
        p.c_row = across ? rows_ * out_.width * channels_ : stride * channels_;
        p.start.from_c = true;
        for (int64_t k = 0; k < depth; k += deep) {
            p.depth = std::min(deep, depth - k), p.b = weights + k * by_.out;
            for (int64_t i = 0; i < (across ? 1 : images_); i++)
                for (int64_t row = y.first; row < y.end; row++)
                    for (int64_t column = x.first; column < (across ? x.end : x.first + 1); column++) {
                        p.a = (const float*)in_.at(first_image_ + i, row, column) + k;
                        p.c = sums(i, stride * row + down - first_row_, stride * column + right);
                        multiply<typename KindOf<In>::Type>(p, across ? images_ : x.end - x.first, channels_);
                    }
        }
    }

    void finish() {
        if (film_.values) modulate();
        for (int64_t i = 0; i < images_; i++)
            for (int64_t row = 0; row < rows_; row++)
                for (int64_t x = 0; x < out_.width; x++) {
                    const float* from = sums(i, row, x);
                    Out* to = out_.at(first_image_ + i, first_row_ + row, x) + first_channel_;
                    for (int64_t c = 0; c < channels_; c += LANES) {
                        Floats value, slope;
                        activate<LOG_SIGMOID>(load(from + c), 1.0f, value, slope);
                        store_as(to + c, value);
                    }
                }
    }

    void modulate() {
        for (int64_t i = 0; i < images_; i++) {
            const float* scale = film_.values + (first_image_ + i) * film_.stride + first_channel_;
            for (int64_t place = 0; place < rows_ * out_.width; place++)
                for (int64_t c = 0; c < channels_; c += LANES) {
                    float* at = sums(i, 0, 0) + place * channels_ + c;
                    const Floats sum = load(at);
                    store(at, sum * load(scale + c) + (sum + load(scale + by_.out + c)));
                }
        }
    }

    static constexpr int64_t PER_WORD = KindOf<In>::PER_WORD;
    const Convolution& by_;
    const Film film_;
    const Signal<const In> in_;
    const Signal<Out> out_;
    const int64_t first_image_, images_, first_row_, rows_, first_channel_, channels_;
    float* sums_;
};

// How a convolution's output is cut into parts; this depends only on its shape.
struct Cut {
    int64_t images, rows, groups, per_image, image_parts;

    Cut(int64_t batch, int64_t height, int64_t width, int64_t channels) {
        const int64_t pixels = std::max<int64_t>(1, PART_FLOATS / std::min(GROUP, channels));
        const bool large = height * width > pixels / 2;
        image_parts = large ? batch : ceil_div(batch, IMAGES);
        images = ceil_div(batch, image_parts);
        image_parts = ceil_div(batch, images);
        rows = large ? std::min(height, std::max<int64_t>(1, pixels / width)) : height;
        rows = ceil_div(height, ceil_div(height, rows));
        per_image = ceil_div(height, rows);
        groups = ceil_div(channels, GROUP);
    }

    int64_t count() const { return image_parts * per_image * groups; }
    int64_t floats(int64_t width) const { return images * rows * width * GROUP; }
};

// This function and those below must be called by all threads of a team, which then have to wait for each other.
template <class In, class Out>
void convolve(const Convolution& by, Signal<const In> in, Signal<Out> out, int64_t batch, float* sums,
              Film film, const Time* time = nullptr) {
    const Cut cut(batch, out.height, out.width, by.out);
#pragma omp for schedule(dynamic) nowait
    for (int64_t part = 0; part < cut.count(); part++) {
        const int64_t group = part % cut.groups, rest = part / cut.groups;
        const int64_t row = rest % cut.per_image * cut.rows, image = rest / cut.per_image * cut.images;
        PartOfConvolution<In, Out>(by, in, out, image, std::min(cut.images, batch - image), row,
                                   std::min(cut.rows, out.height - row), group * GROUP, film, sums)
            .run(time);
    }
}

// The last convolution, to few channels: weights [out, 9, in] fp32, no activation. Writes [images, out, y, x].
template <class In>
void convolve_last(const Convolution& by, Signal<const In> in, float* out, int64_t batch) {
#pragma omp for schedule(static) nowait
    for (int64_t line = 0; line < batch * in.height; line++) {
        const int64_t image = line / in.height, y = line % in.height;
        for (int64_t channel = 0; channel < by.out; channel++)
            for (int64_t x = 0; x < in.width; x++) {
                Floats sum{};
                for (int64_t ky = std::max<int64_t>(0, 1 - y); ky < std::min<int64_t>(3, in.height + 1 - y); ky++)
                    for (int64_t kx = std::max<int64_t>(0, 1 - x); kx < std::min<int64_t>(3, in.width + 1 - x); kx++) {
                        const In* pixel = in.at(image, y + ky - 1, x + kx - 1);
                        const float* weights = (const float*)by.weights + (channel * 9 + ky * 3 + kx) * by.in;
                        for (int64_t c = 0; c < by.in; c += LANES) sum += load_as(pixel + c) * load(weights + c);
                    }
                float total = by.bias[channel];
                for (int i = 0; i < LANES; i++) total += sum[i];
                out[((image * by.out + channel) * in.height + y) * in.width + x] = total;
            }
    }
}

// The maximum of 2 x 2 pixels; with an odd size the first row or column is on its own. NaN propagates.
template <class T>
void pool(Signal<const T> in, Signal<T> out, int64_t channels, int64_t batch) {
#pragma omp for schedule(static) nowait
    for (int64_t line = 0; line < batch * out.height; line++) {
        const int64_t image = line / out.height, y = line % out.height;
        const int64_t top = 2 * y - in.height % 2;
        for (int64_t x = 0; x < out.width; x++) {
            const int64_t left = 2 * x - in.width % 2;
            for (int64_t c = 0; c < channels; c += LANES) {
                Floats most = load_as(in.at(image, top + 1, left + 1) + c);
                for (int64_t i = std::max<int64_t>(top, 0); i <= top + 1; i++)
                    for (int64_t j = std::max<int64_t>(left, 0); j <= left + 1; j++) {
                        const Floats next = load_as(in.at(image, i, j) + c);
                        most = most > next ? most : next == next ? (most == most ? next : most) : next;
                    }
                store_as(out.at(image, y, x) + c, most);
            }
        }
    }
}

// The network, and the memory for a chunk of images.
template <class T>
class Unet {
  public:
    Unet(int64_t chunk, int64_t image_channels, int64_t height, int64_t width, int64_t levels, const int64_t* channels,
         const void* const* weights, const float* const* biases)
        : image_channels_(image_channels), levels_(levels), channels_(channels), weights_(weights), biases_(biases),
          image_(allocate<float>(chunk, height, width, image_channels)),
          head_(allocate<T>(chunk, height, width, channels[0])) {
        for (int64_t l = 0; l < levels; l++, height = (height + 1) / 2, width = (width + 1) / 2) {
            wide_.push_back(allocate<T>(chunk, height, width, l + 1 == levels ? channels[l] : 2 * channels[l]));
            if (l) pooled_.push_back(allocate<T>(chunk, height, width, channels[l - 1]));
            floats_ = std::max(floats_, Cut(chunk, height, width, channels[l]).floats(width));
        }
    }

    // The number of floats that each thread accumulates in.
    int64_t floats() const { return floats_; }

    // x and out [images, channels, height, width], with at most a chunk of images. Must be called by all threads of a
    // team.
    void forward(int64_t images, const float* x, const Time& time, Film film, float* out, float* sums) {
        const auto next = [&film](int64_t channels) {  // those of the next layer
            const Film own = film;
            if (film.values) film.values += 2 * channels;
            return own;
        };
        channels_last(images, x);
        barrier_.wait();
        for (int64_t l = 0; l < levels_; l++) {
            Signal<T> to = wide_[l];
            if (l + 1 < levels_) to.data += channels_[l];
            if (l == 0) {
                convolve<float, T>(layer(0, image_channels_, channels_[0]), readable(image_), to, images, sums,
                                   next(channels_[0]), &time);
                barrier_.wait();
                continue;
            }
            Signal<const T> behind = readable(wide_[l - 1]);
            behind.data += channels_[l - 1];
            pool<T>(behind, pooled_[l - 1], channels_[l - 1], images);
            barrier_.wait();
            convolve<T, T>(layer(l, channels_[l - 1], channels_[l]), readable(pooled_[l - 1]), to, images, sums,
                           next(channels_[l]));
            barrier_.wait();
        }
        int64_t number = levels_;
        for (int64_t l = levels_ - 1; l > 0; l--, number++) {
            const Convolution by = layer(number, wide_[l].stride, channels_[l - 1], true);
            convolve<T, T>(by, readable(wide_[l]), wide_[l - 1], images, sums, next(channels_[l - 1]));
            barrier_.wait();
        }
        convolve<T, T>(layer(number, wide_[0].stride, channels_[0]), readable(wide_[0]), head_, images, sums,
                       next(channels_[0]));
        barrier_.wait();
        convolve_last<T>(layer(number + 1, channels_[0], image_channels_), readable(head_), out, images);
        barrier_.wait();
    }

  private:
    Convolution layer(int64_t number, int64_t in, int64_t out, bool transposed = false) const {
        return Convolution{in, out, transposed, weights_[number], biases_[number]};
    }

    void channels_last(int64_t images, const float* x) {
        const int64_t pixels = image_.height * image_.width;
#pragma omp for schedule(static) nowait
        for (int64_t place = 0; place < images * pixels; place++)
            for (int64_t c = 0; c < image_channels_; c++)
                image_.data[place * image_channels_ + c] =
                    x[(place / pixels * image_channels_ + c) * pixels + place % pixels];
    }

    // The memory is not touched before it is written.
    template <class Kind>
    Signal<Kind> allocate(int64_t images, int64_t height, int64_t width, int64_t channels) {
        const int64_t bytes = images * height * width * channels * (int64_t)sizeof(Kind);
        memory_.emplace_back(std::aligned_alloc(64, ceil_div(bytes, 64) * 64), std::free);
        if (!memory_.back()) throw std::bad_alloc();
        return Signal<Kind>{(Kind*)memory_.back().get(), height, width, channels};
    }

    template <class Kind>
    static Signal<const Kind> readable(Signal<Kind> signal) {
        return Signal<const Kind>{signal.data, signal.height, signal.width, signal.stride};
    }

    std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;  // first, since the signals below point into it
    Barrier barrier_;
    int64_t image_channels_, levels_, floats_ = 0;
    const int64_t* channels_;
    const void* const* weights_;
    const float* const* biases_;
    Signal<float> image_;
    Signal<T> head_;
    std::vector<Signal<T>> wide_, pooled_;  // per level: the decoder's channels first, then the encoder's
};

}  // namespace

// Returns whether the kernel has bf16.
extern "C" int fastsde_unet_has_bf16(int) {
#if defined(FASTSDE_BF16)
    return 1;
#else
    return 0;
#endif
}

// x and out [batch, image_channels, height, width], t [batch], plane [height, width, channels[0]], films
// [batch, widths], for each layer but the last 2 * out values, or null, all fp32. weights
// and biases hold one array per layer (encoder, decoder, head). Weights are [9, in, out] fp32, or bf16
// [9, in / 2, out, 2] with ``bf16``; the first and the last layer's are always fp32, and the last layer's [out, 9, in].
extern "C" int fastsde_unet(int64_t batch, int64_t image_channels, int64_t height, int64_t width, int64_t levels,
                            const int64_t* channels, const void* const* weights, const float* const* biases,
                            const float* plane, const float* x, const float* t, const float* films, int64_t widths,
                            float* out, int bf16, int threads) {
    // With so many images at once, every thread gets a part, and the signals stay in the cache.
    const int64_t chunk = std::min(batch, IMAGES * std::max(threads, 2));
    const auto run = [=](auto&& unet) {
        PerThread<Buffer> sums(threads, unet.floats());
        const int64_t pixels = image_channels * height * width;
        run_team(threads, [&] {
            for (int64_t i = 0; i < batch; i += chunk)
                unet.forward(std::min(chunk, batch - i), x + i * pixels, Time{t + i, plane},
                             Film{films ? films + i * widths : nullptr, widths}, out + i * pixels, sums.mine());
        });
    };
    return with_status([&] {
#if defined(FASTSDE_BF16)
        if (bf16) return run(Unet<Half>(chunk, image_channels, height, width, levels, channels, weights, biases));
#endif
        (void)bf16;
        run(Unet<float>(chunk, image_channels, height, width, levels, channels, weights, biases));
    });
}
