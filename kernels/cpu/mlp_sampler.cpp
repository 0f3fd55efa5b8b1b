// Trajectories of an MLP score network: each thread takes blocks of up to 64 samples through some rows of the table.
// For few samples and wide layers all threads share a block, each computes some of a layer's outputs, and up to 16
// samples are multiplied by dot products along the features.
//
// The slots of the state and the activations of a block are [features, samples] and stay in the cache. A layer is one
// product of its weights [out, in] with them; the time is an extra input, whose weights are added to the bias of the
// first layer once per row:
//
//     x = n.s,  h_1 = act(W_1 x + (b_1 + time w_time)),  h_l = act(W_l h_{l-1} + b_l),  f = W_L h_{L-1} + b_L
//
// and then comes the row's step (table.h). A slot that only moves on is renamed: its memory becomes another slot's.

#include "activations.h"
#include "gemm.h"
#include "memory.h"
#include "parts.h"
#include "table.h"

using namespace fastsde;

namespace {

constexpr int64_t MOST_SAMPLES = 64;  // per block; a multiple of COLUMNS, like every number of samples per block
constexpr int64_t SHARED_PRODUCTS = 1 << 20;  // per layer and thread; with fewer, waiting for others takes too long
constexpr int64_t SHARED_ROWS = 12;           // of a layer, that a thread takes at once: a tile of a product
constexpr int64_t FEW_PRODUCTS = 1 << 15;     // per layer; from here on few samples are not padded to COLUMNS

// widths: of x (without the time), of each hidden layer, and of f. A bias may be null.
struct Mlp {
    int64_t layers;
    const float* const* weights;
    const float* const* biases;
    const int64_t* widths;
    std::vector<Activation> activations;

    int64_t dim() const { return widths[layers]; }
    int64_t widest() const { return *std::max_element(widths, widths + layers + 1); }

    // Per layer, on average.
    int64_t products() const {
        int64_t sum = 0;
        for (int64_t l = 0; l < layers; l++) sum += widths[l] * widths[l + 1];
        return sum / layers;
    }
};

// Rows ``first_row`` to ``end_row - 1`` of a table of m slots, for the samples up to ``end`` of a batch. Between two
// calls slot 0 is kept in ``out``, and the other slots in ``others``.
struct Trajectory {
    const float* table;
    int64_t m, first_row, end_row;
    const int64_t* keys;
    const float* x_init;
    float clip;
    int64_t end, batch, every;
    float *states, *others, *out;
};

// Takes the samples of a block from row to row.
class Samples {
  public:
    // ``shared``: the block is shared by all threads of a team, which call run() together.
    Samples(const Mlp& mlp, const Trajectory& run, int64_t width, bool shared)
        : mlp_(mlp), run_(run), shared_(shared), m_((int)run.m), dim_(mlp.dim()), width_(width), size_(dim_ * width),
          state_(m_ * size_), mixture_(size_), noise_(size_), first_bias_(mlp.widths[1]),
          signal_(mlp.widest() * width), next_(mlp.widest() * width),
          few_(run.batch <= COLUMNS && mlp.products() >= FEW_PRODUCTS), row_(padded(mlp.widest())),
          rows_(few_ ? COLUMNS * row_ : 0), next_rows_(few_ ? COLUMNS * row_ : 0) {}

    void run(int64_t first) {
        by_one([&] { start(first); });
        for (int64_t row = run_.first_row; row < run_.end_row; row++) {
            const float* f = network(row_of(row).time());
            by_one([&] { step(f, row); });
        }
        by_one([&] {
            for (int j = 0; j < m_; j++)
                if (float* to = kept(j)) write(slots_[j], to);
        });
    }

  private:
    // Runs body() in one thread, for which the others wait.
    template <class Body>
    void by_one(Body body) {
        if (!shared_) return body();
#pragma omp single nowait
        body();
        barrier_.wait();
    }

    // Runs body(first, end) for rows of a layer's output: all at once, or split over the threads, which then wait for
    // each other.
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
        for (int j = 0; j < m_; j++) slots_[j] = state_ + j * size_;
        begin();
        mix(run_.first_row);
    }

    void begin() {
        for (int j = 0; j < m_; j++) read(run_.first_row > 0 ? kept(j) : nullptr, slots_[j]);
        if (run_.first_row > 0) return;
        if (run_.x_init)
            read(run_.x_init, slots_[0]);
        else
            draw(0, slots_[0]);
        if (run_.states) write(slots_[0], run_.states);
    }

    // Where a slot is kept between two calls, or null.
    float* kept(int j) const {
        if (j == 0) return run_.out;
        return run_.others ? run_.others + (j - 1) * run_.batch * dim_ : nullptr;
    }

    Row<> row_of(int64_t row) const { return {run_.table + row * row_width(m_), m_}; }

    // Sets the network's input of a row, which may be slot 0 itself.
    void mix(int64_t row) {
        const Row<> k = row_of(row);
        input_ = slots_[0];
        if (k.has_input()) {
            input_ = mixture_;
            for (int64_t i = 0; i < size_; i += LANES) {
                Floats s[MAX_SLOTS];
                for (int j = 0; j < m_; j++) s[j] = load(slots_[j] + i);
                store(mixture_ + i, k.input(s));
            }
        }
        if (few_) to_rows(input_, dim_, 0, rows_);
    }

    // Writes the step's normals to [dim, samples].
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

    // Returns f [dim, samples] for the input.
    const float* network(float time) {
        const float* from = input_;
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

    void step(const float* f, int64_t row) {
        with_slots(m_, [&](auto known) { step(Row<known>{row_of(row).k, m_}, f, row); });
        if (run_.states && (row + 1) % run_.every == 0)
            write(slots_[0], run_.states + (row + 1) / run_.every * run_.batch * dim_);
        if (row + 1 < run_.end_row) mix(row + 1);
    }

    template <int M>
    void step(const Row<M> k, const float* f, int64_t row) {
        if (k.has_noise()) draw(row + 1, noise_);
        float* next[MAX_SLOTS];
        bool formed[MAX_SLOTS];
        rename(k, next, formed);
        bool has_data = false;
        for (int j = 0; j < k.slots(); j++) has_data |= formed[j] && k.e(j) != 0.0f;
        for (int64_t i = 0; i < size_; i += LANES) {
            Floats s[MAX_SLOTS];
            for (int j = 0; j < k.slots(); j++) s[j] = load(slots_[j] + i);
            const Floats out = load(f + i), z = load(noise_ + i), x = load(input_ + i);
            const Floats data = has_data ? k.data(s, out, run_.clip) : Floats{};
            // A sample that is not finite stays so to the end, whatever clips or activations do.
            store(next[0] + i, k.slot(0, s, out, data, z) + 0.0f * (s[0] + x + out));
            for (int j = 1; j < k.slots(); j++)
                if (formed[j]) store(next[j] + i, k.slot(j, s, out, data, z));
        }
        std::copy(next, next + m_, slots_);
    }

    // Decides where the new slots go: a slot that takes over an old one unchanged stays in its memory, and slots that
    // are computed (``formed``) use the memory that is left. Slot 0 is always computed.
    template <int M>
    void rename(const Row<M> k, float** next, bool* formed) const {
        bool taken[MAX_SLOTS] = {};
        for (int j = 0; j < k.slots(); j++) {
            const int source = j == 0 ? -1 : k.source(j);
            formed[j] = source < 0 || taken[source];
            if (formed[j]) continue;
            next[j] = slots_[source];
            taken[source] = true;
        }
        for (int j = 0, free = 0; j < k.slots(); j++) {
            if (!formed[j]) continue;
            while (taken[free]) free++;
            next[j] = slots_[free++];
        }
    }

    // Copies ``count`` features [features, samples] to columns of [samples, features], from column ``first`` on.
    void to_rows(const float* from, int64_t count, int64_t first, float* to) const {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t i = 0; i < count; i++) to[s * row_ + first + i] = from[i * width_ + s];
    }

    // Reads the block's part of [batch, dim]; zeros if ``from`` is null, and for samples beyond the batch.
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
    const int m_;
    const int64_t dim_, width_, size_;  // of a slot
    int64_t first_ = 0, here_ = 0;
    Keys keys_[MOST_SAMPLES / LANES];
    Buffer state_, mixture_, noise_, first_bias_, signal_, next_;
    float* slots_[MAX_SLOTS];
    const float* input_ = nullptr;
    const bool few_;
    const int64_t row_;
    Buffer rows_, next_rows_;  // for few samples: the input of a layer and its output as [samples, features]
};

}  // namespace

// Takes the samples ``first`` to ``end - 1`` of a batch through the rows ``first_row`` to ``end_row - 1``, and writes
// slot 0 to ``out`` [batch, dim], the other slots to ``others`` [m - 1, batch, dim], and every ``every``-th state to
// ``states`` [rows / every + 1, batch, dim].
//
// weights[l] is [widths[l + 1], widths[l]], with one more column in the first layer, for the time. table is
// [rows, 2 + 5 m + m^2]. A call that does not start with row 0 continues from ``out`` and ``others`` as an earlier call
// left them. Nullable: x_init (then drawn), states, each bias, and ``others`` if one call takes all rows. clip is
// infinite if there is none.
extern "C" int fastsde_mlp_sampler(int64_t layers, const float* const* weights, const float* const* biases,
                                    const int64_t* widths, const int32_t* activations, const float* table, int64_t m,
                                    int64_t first_row, int64_t end_row, const int64_t* keys, const float* x_init,
                                    float clip, int64_t first, int64_t end, int64_t batch, int64_t every,
                                    float* states, float* others, float* out, int threads) {
    return with_status([&] {
        const Mlp mlp{layers, weights, biases, widths, known_activations(activations, layers - 1)};
        const Trajectory run{table, m, first_row, end_row, keys, x_init, clip, end, batch, every, states, others, out};
        const int64_t least = std::min(MOST_SAMPLES, padded(end - first));
        if (ceil_div(end - first, COLUMNS) < threads && mlp.products() * least >= SHARED_PRODUCTS * threads) {
            Samples samples(mlp, run, least, true);
            run_team(threads, [&] {
                for (int64_t at = first; at < end; at += least) samples.run(at);
            });
            return;
        }
        int64_t width = MOST_SAMPLES;  // fewer if some threads would have nothing to do
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
