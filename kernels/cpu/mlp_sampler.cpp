// Trajectories of an MLP score network: every thread takes blocks of up to 64 samples through some rows of the table.
// Of few samples of wide layers, all threads share a block, each has some of a layer's outputs, and up to 16 samples are
// multiplied by dot products along the features.
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

enum Column { TIME, A, B, C, D, E, P, Q, TABLE_COLUMNS };
static inline Floats row_of(const float* k, float clip, Floats x, Floats f, Floats history, Floats noise,
                            Floats& data) {
    data = at_least(at_most(k[P] * x + k[Q] * f, clip), -clip);
    Floats next = k[A] * x + k[B] * f;
    if (k[C] != 0.0f) next += k[C] * history;
    if (k[E] != 0.0f) next += k[E] * data;
    if (k[D] != 0.0f) next += k[D] * noise;
    return next;
}

constexpr int64_t MOST_SAMPLES = 64;  // of a block; a multiple of COLUMNS, as every width of one
constexpr int64_t SHARED_PRODUCTS = 1 << 20;  // of a layer and thread, below which to wait for others takes too long
constexpr int64_t SHARED_ROWS = 12;           // of a layer, that a thread takes at once: a tile of a product
constexpr int64_t FEW_PRODUCTS = 1 << 15;     // of a layer, from which on few samples are not padded to COLUMNS

// widths are those of x (without the time), of each hidden layer, and of f. A bias may be null.
struct Mlp {
    int64_t layers;
    const float* const* weights;
    const float* const* biases;
    const int64_t* widths;
    std::vector<Activation> activations;

    int64_t dim() const { return widths[layers]; }
    int64_t widest() const { return *std::max_element(widths, widths + layers + 1); }

    // Of a layer, in the mean.
    int64_t products() const {
        int64_t sum = 0;
        for (int64_t l = 0; l < layers; l++) sum += widths[l] * widths[l + 1];
        return sum / layers;
    }
};

// From ``first_row`` to before ``end_row``, of the samples up to ``end`` of a batch. Between two calls a state is
// kept in ``out``, and D in ``history``.
struct Trajectory {
    const float* table;
    int64_t first_row, end_row;
    const int64_t* keys;
    const float* x_init;
    float clip;
    int64_t end, batch, every;
    float *states, *history, *out;
};

// The samples of a block, from row to row.
class Samples {
  public:
    // ``shared``: by all threads of a team, which call run together.
    Samples(const Mlp& mlp, const Trajectory& run, int64_t width, bool shared)
        : mlp_(mlp), run_(run), shared_(shared), dim_(mlp.dim()), width_(width), x_(dim_ * width),
          history_(dim_ * width), noise_(dim_ * width), first_bias_(mlp.widths[1]), signal_(mlp.widest() * width),
          next_(mlp.widest() * width), few_(run.batch <= COLUMNS && mlp.products() >= FEW_PRODUCTS),
          row_(padded(mlp.widest())), rows_(few_ ? COLUMNS * row_ : 0), next_rows_(few_ ? COLUMNS * row_ : 0) {}

    void run(int64_t first) {
        by_one([&] { start(first); });
        for (int64_t row = run_.first_row; row < run_.end_row; row++) {
            const float* k = run_.table + row * TABLE_COLUMNS;
            const float* f = network(k[TIME]);
            by_one([&] { step(k, f, row); });
        }
        by_one([&] {
            write(x_, run_.out);
            if (run_.history) write(history_, run_.history);
        });
    }

  private:
    // body() in one thread, for which the others wait.
    template <class Body>
    void by_one(Body body) {
        if (!shared_) return body();
#pragma omp single nowait
        body();
        barrier_.wait();
    }

    // body(first, end) for rows of a layer's output: all at once, or by all threads, which then wait for one another.
    template <class Body>
    void for_rows(int64_t rows, Body body) {
        if (!shared_) return body(0, rows);
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < rows; first += SHARED_ROWS) body(first, std::min(rows, first + SHARED_ROWS));
        barrier_.wait();
    }

    void start(int64_t first) {
        first_ = first, here_ = std::min(width_, run_.end - first);
        for (int g = 0; g < width_ / LANES; g++) keys_[g] = Keys::load(run_.keys, first + g * LANES, run_.batch);
        begin();
        if (few_) to_rows(x_, dim_, 0, rows_);
    }

    void begin() {
        if (run_.first_row > 0) {
            read(run_.out, x_), read(run_.history, history_);
            return;
        }
        read(nullptr, history_);
        if (run_.x_init)
            read(run_.x_init, x_);
        else
            draw(0, x_);
        if (run_.states) write(x_, run_.states);
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
        float *to = signal_, *other = next_, *rows = rows_, *other_rows = next_rows_;
        for (int64_t l = 0; l < mlp_.layers; l++) {
            const int64_t in = mlp_.widths[l], out = mlp_.widths[l + 1], stride = l == 0 ? in + 1 : in;
            const float *weights = mlp_.weights[l], *given = mlp_.biases[l];
            const float* bias = l == 0 ? (const float*)first_bias_ : given;
            for_rows(out, [&](int64_t first, int64_t end) {
                for (int64_t o = first; l == 0 && o < end; o++)
                    first_bias_[o] = (given ? given[o] : 0.0f) + time * weights[o * stride + in];
                float* c = to + first * width_;
                const float *w = weights + first * stride, *start = bias ? bias + first : nullptr;
                if (few_) {
                    multiply(Dots{w, stride, rows, row_, c, width_, in, start}, end - first, here_);
                } else {
                    Product product{w, stride, 1, from, width_, c, width_, in, {}};
                    product.start.of_row = start;
                    multiply(product, end - first, width_);
                }
                if (l + 1 < mlp_.layers) activate(mlp_.activations[l], c, nullptr, (end - first) * width_);
                if (few_) to_rows(c, end - first, first, other_rows);
            });
            from = to;
            std::swap(to, other), std::swap(rows, other_rows);
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
        if (few_) to_rows(x_, dim_, 0, rows_);
        if (run_.states && (row + 1) % run_.every == 0)
            write(x_, run_.states + (row + 1) / run_.every * run_.batch * dim_);
    }

    // ``count`` features [features, samples] to columns of [samples, features], from the column ``first`` on.
    void to_rows(const float* from, int64_t count, int64_t first, float* to) const {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t i = 0; i < count; i++) to[s * row_ + first + i] = from[i * width_ + s];
    }

    // The block's share of [batch, dim]; zeros where there is none.
    void read(const float* from, float* to) {
        for (int64_t e = 0; e < dim_; e++)
            for (int64_t s = 0; s < width_; s++)
                to[e * width_ + s] = from && s < here_ ? from[(first_ + s) * dim_ + e] : 0.0f;
    }

    void write(const float* from, float* to) {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t e = 0; e < dim_; e++) to[(first_ + s) * dim_ + e] = from[e * width_ + s];
    }

    const Mlp& mlp_;
    const Trajectory& run_;
    const bool shared_;
    Barrier barrier_;
    int64_t dim_, width_, first_ = 0, here_ = 0;
    Keys keys_[MOST_SAMPLES / LANES];
    Buffer x_, history_, noise_, first_bias_, signal_, next_;
    const bool few_;
    const int64_t row_;
    Buffer rows_, next_rows_;  // of few samples, the input of a layer and its output as [samples, features]
};

}  // namespace

// Rows ``first_row`` to ``end_row - 1`` of the samples ``first`` to ``end - 1`` of a batch: their states then go to
// ``out`` [batch, dim], and every ``every``-th state on the way to ``states`` [rows / every + 1, batch, dim].
//
// weights[l] is [widths[l + 1], widths[l]], and that of the first layer one column wider, for the time. table is
// [rows, 8]. A call that does not start with row 0 goes on from ``out`` and ``history`` [batch, dim] as another call
// has left them. Nullable: x_init (then drawn), states, each bias, and history, where one call has all rows. clip is
// infinite where there is none.
extern "C" int fastsde_mlp_sampler(int64_t layers, const float* const* weights, const float* const* biases,
                                    const int64_t* widths, const int32_t* activations, const float* table,
                                    int64_t first_row, int64_t end_row, const int64_t* keys, const float* x_init,
                                    float clip, int64_t first, int64_t end, int64_t batch, int64_t every,
                                    float* states, float* history, float* out, int threads) {
    return with_status([&] {
        const Mlp mlp{layers, weights, biases, widths, known_activations(activations, layers - 1)};
        const Trajectory run{table, first_row, end_row, keys, x_init, clip, end, batch, every, states, history, out};
        const int64_t least = std::min(MOST_SAMPLES, padded(end - first));
        if (ceil_div(end - first, COLUMNS) < threads && mlp.products() * least >= SHARED_PRODUCTS * threads) {
            Samples samples(mlp, run, least, true);
            run_team(threads, [&] {
                for (int64_t at = first; at < end; at += least) samples.run(at);
            });
            return;
        }
        int64_t width = MOST_SAMPLES;  // less where some threads would have nothing to do
        while (width > COLUMNS && ceil_div(end - first, width) < threads) width /= 2;
        const int64_t blocks = ceil_div(end - first, width), team = std::min<int64_t>(threads, blocks);
        PerThread<Samples> samples((int)team, mlp, run, width, false);
        run_team((int)team, [&] {
#pragma omp for schedule(dynamic) nowait
            for (int64_t i = 0; i < blocks; i++) samples.mine().run(first + i * width);
        });
    });
}

extern "C" int fastsde_activation(const char* name, int) { return code_of<Activation>(name); }
