// Whole trajectories of an MLP score network: every thread takes blocks of up to 64 samples from the prior to the end.
//
// The state and the activations of a block are [features, samples] and stay in the cache. A layer is one product of its
// weights [out, in] with them; the time is an extra input, whose weights join the bias of the first layer, once a row:
//
//     h_1 = act(W_1 x + (b_1 + time w_time)),  h_l = act(W_l h_{l-1} + b_l),  f = W_L h_{L-1} + b_L

#include "activations.h"
#include "gemm.h"
#include "memory.h"
#include "parts.h"
#include "table.h"

using namespace fastsde;

namespace {

constexpr int64_t MOST_SAMPLES = 64;  // of a block; a multiple of COLUMNS, as every width of one

// widths are those of x (without the time), of each hidden layer, and of f. A bias may be null.
struct Mlp {
    int64_t layers;
    const float* const* weights;
    const float* const* biases;
    const int64_t* widths;
    const int32_t* activations;

    int64_t dim() const { return widths[layers]; }
    int64_t widest() const { return *std::max_element(widths, widths + layers + 1); }
};

struct Trajectory {
    const float* table;
    int64_t rows;
    const int64_t* keys;
    const float* x_init;
    float clip;
    int64_t end, batch, every;  // samples up to ``end`` are taken, of a batch
    float *states, *out;
};

// The samples of a block, from row to row.
class Samples {
  public:
    Samples(const Mlp& mlp, const Trajectory& run, int64_t width)
        : mlp_(mlp), run_(run), dim_(mlp.dim()), width_(width), x_(dim_ * width), history_(dim_ * width),
          noise_(dim_ * width), first_bias_(mlp.widths[1]), signal_(mlp.widest() * width),
          next_(mlp.widest() * width) {}

    void run(int64_t first) {
        first_ = first, here_ = std::min(width_, run_.end - first);
        for (int g = 0; g < width_ / LANES; g++) keys_[g] = Keys::load(run_.keys, first + g * LANES, run_.batch);
        start();
        for (int64_t row = 0; row < run_.rows; row++) {
            const float* k = run_.table + row * TABLE_COLUMNS;
            step(k, network(k[TIME]), row);
            if (run_.states && (row + 1) % run_.every == 0)
                keep(run_.states + (row + 1) / run_.every * run_.batch * dim_);
        }
        keep(run_.out);
    }

  private:
    void start() {
        std::fill((float*)history_, history_ + dim_ * width_, 0.0f);
        if (run_.x_init) {
            for (int64_t e = 0; e < dim_; e++)
                for (int64_t s = 0; s < width_; s++)
                    x_[e * width_ + s] = s < here_ ? run_.x_init[(first_ + s) * dim_ + e] : 0.0f;
        } else {
            draw(0, x_);
        }
        if (run_.states) keep(run_.states);
    }

    // The step's normals, to [dim, samples].
    void draw(uint64_t step, float* to) {
        const uint64_t offset = draw_offset(step, SAMPLING);
        for (int64_t e = 0; e < dim_; e += 4)
            for (int g = 0; g < width_ / LANES; g++) {
                Floats z[4];
                const int64_t count = std::min<int64_t>(4, dim_ - e);
                normals_across(keys_[g], offset + e / 4, count, z);
                for (int64_t i = 0; i < count; i++)
                    store(to + (e + i) * width_ + g * LANES, z[i]);
            }
    }

    // f [dim, samples] of the state.
    const float* network(float time) {
        const float* from = x_;
        float *to = signal_, *other = next_;
        for (int64_t l = 0; l < mlp_.layers; l++) {
            const int64_t in = mlp_.widths[l], out = mlp_.widths[l + 1], stride = l == 0 ? in + 1 : in;
            const float *weights = mlp_.weights[l], *bias = mlp_.biases[l];
            if (l == 0) {
                for (int64_t o = 0; o < out; o++)
                    first_bias_[o] = (bias ? bias[o] : 0.0f) + time * weights[o * stride + in];
                bias = first_bias_;
            }
            Product product{weights, stride, 1, from, width_, to, width_, in, {}};
            product.start.of_row = bias;
            multiply(product, out, width_);
            if (l + 1 < mlp_.layers) activate(mlp_.activations[l], to, nullptr, out * width_);
            from = to;
            std::swap(to, other);
        }
        return from;
    }

    void step(const float* k, const float* f, int64_t row) {
        if (k[D] != 0.0f) draw(row + 1, noise_);
        for (int64_t i = 0; i < dim_ * width_; i += LANES) {
            const Floats x = load(x_ + i), out = load(f + i);
            Floats data;
            const Floats next = row_of(k, run_.clip, x, out, load(history_ + i), load(noise_ + i), data);
            store(history_ + i, data);
            // What is not finite stays so to the end, whatever clips or activations make of it.
            store(x_ + i, next + 0.0f * (x + out));
        }
    }

    // The state to its place in [batch, dim].
    void keep(float* to) {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t e = 0; e < dim_; e++) to[(first_ + s) * dim_ + e] = x_[e * width_ + s];
    }

    const Mlp& mlp_;
    const Trajectory& run_;
    int64_t dim_, width_, first_ = 0, here_ = 0;
    Keys keys_[MOST_SAMPLES / LANES];
    Buffer x_, history_, noise_, first_bias_, signal_, next_;
};

}  // namespace

// The samples ``first`` to ``end - 1`` of a batch: to ``out`` [batch, dim], and every ``every``-th state of theirs to
// ``states`` [rows / every + 1, batch, dim].
//
// weights[l] is [widths[l + 1], widths[l]], and that of the first layer one column wider, for the time. table is
// [rows, 8]. Nullable: x_init (then drawn), states, each bias. clip is infinite where there is none.
extern "C" int fastsde_mlp_sampler(int64_t layers, const float* const* weights, const float* const* biases,
                                    const int64_t* widths, const int32_t* activations, const float* table,
                                    int64_t rows, const int64_t* keys, const float* x_init, float clip, int64_t first,
                                    int64_t end, int64_t batch, int64_t every, float* states, float* out,
                                    int threads) {
    const Mlp mlp{layers, weights, biases, widths, activations};
    const Trajectory run{table, rows, keys, x_init, clip, end, batch, every, states, out};
    int64_t width = MOST_SAMPLES;  // less where some threads would have nothing to do
    while (width > COLUMNS && ceil_div(end - first, width) < threads) width /= 2;
    const int64_t blocks = ceil_div(end - first, width);
    threads = (int)std::min<int64_t>(threads, blocks);
    return with_memory([&] {
        PerThread<Samples> samples(threads, mlp, run, width);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < blocks; i++) samples.mine().run(first + i * width);
    });
}
