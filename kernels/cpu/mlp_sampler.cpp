// Trajectories of a small network: each thread takes blocks of up to 64 samples through some rows of the table. For few
// samples and wide layers all threads share a block, each computes some of a layer's outputs, and up to 16 samples are
// multiplied by dot products along the features.
//
// The slots of the state and the values of the network are [features, samples] and stay in the cache. The network is a
// program (program.h), which gives f for the input x = n.s; then comes the row's step (table.h). What the network
// computes from the time alone is given as numbers per row, and what it computes from a sample's conditions as numbers
// per sample. A slot that only moves on is renamed: its memory becomes another slot's.

#include "memory.h"
#include "parts.h"
#include "program.h"
#include "table.h"

using namespace fastsde;

namespace {

constexpr int64_t MOST_SAMPLES = 64;  // per block; a multiple of COLUMNS, like every number of samples per block
constexpr int64_t SHARED_PRODUCTS = 1 << 20;  // per layer and thread; with fewer, waiting for others takes too long
constexpr int64_t TILE_ROWS = 12;             // of a product, that a thread takes at once
constexpr int64_t FEW_PRODUCTS = 1 << 15;     // per layer; from here on few samples are not padded to COLUMNS

// The network: its input and output have ``dim`` units each, the output from unit ``result`` on. Units [dim, dim +
// conditions) are what each sample is given, and ``units`` counts all.
struct Network {
    const Instruction* program;
    int64_t length, units, conditions, dim, result;
    const float* given;    // [batch, conditions]
    const float* vectors;  // [rows, of_row], from the first row of the call on
    int64_t of_row;

    // Per linear layer, on average.
    int64_t products() const {
        int64_t sum = 0, layers = 0;
        for (int64_t i = 0; i < length; i++)
            if (program[i].operation == LINEAR) sum += program[i].width * program[i].depth, layers++;
        return sum / std::max<int64_t>(layers, 1);
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
    Samples(const Network& network, const Trajectory& run, int64_t width, bool shared)
        : network_(network), run_(run), shared_(shared), m_((int)run.m), dim_(network.dim), width_(width),
          size_(dim_ * width), state_(m_ * size_), mixture_(size_), noise_(size_),
          memory_((network.units - dim_) * width), units_{nullptr, memory_, dim_, width},
          few_(run.batch <= COLUMNS && network.products() >= FEW_PRODUCTS), rows_(few_ ? COLUMNS * network.units : 0) {}

    void run(int64_t first) {
        by_one([&] { start(first); });
        for (int64_t row = run_.first_row; row < run_.end_row; row++) {
            const float* f = evaluate(row);
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

    // Runs body(first, end) for rows of a value: split over the threads, which then wait for each other, or tile by tile
    // so that what follows a product finds it in the cache.
    template <class Body>
    void for_rows(int64_t rows, Body body) {
        const int64_t each = TILE_ROWS * (MOST_SAMPLES / width_);
        if (!shared_) {
            for (int64_t first = 0; first < rows; first += each) body(first, std::min(rows, first + each));
            return;
        }
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < rows; first += TILE_ROWS) body(first, std::min(rows, first + TILE_ROWS));
        barrier_.wait();
    }

    void start(int64_t first) {
        first_ = first, here_ = std::min(width_, run_.end - first);
        for (int g = 0; g < width_ / LANES; g++) keys_[g] = Keys::load(run_.keys, first + g * LANES, run_.batch);
        for (int j = 0; j < m_; j++) slots_[j] = state_ + j * size_;
        begin();
        read(network_.given, network_.conditions, memory_);
        if (few_) to_rows(memory_, network_.conditions, dim_);
        mix(run_.first_row);
    }

    void begin() {
        for (int j = 0; j < m_; j++) read(run_.first_row > 0 ? kept(j) : nullptr, dim_, slots_[j]);
        if (run_.first_row > 0) return;
        if (run_.x_init)
            read(run_.x_init, dim_, slots_[0]);
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
        units_.input = input_;
        if (few_) to_rows(input_, dim_, 0);
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
    const float* evaluate(int64_t row) {
        const float* of_row = network_.vectors + (row - run_.first_row) * network_.of_row;
        for (int64_t i = 0, next; i < network_.length; i = next) {
            for (next = i + 1; next < network_.length && !network_.program[next].starts_stage;) next++;
            const Instruction& first = network_.program[i];
            const bool grouped = first.operation >= MEAN;
            for_rows(grouped ? first.width / first.depth : first.width, [&](int64_t begin, int64_t end) {
                for (int64_t at = i; at < next; at++) {
                    const Instruction* k = network_.program + at;
                    if (at + 1 < next && is_cosine_of(k[1], k[0])) {
                        run_sine_and_cosine(k[0], k[1], units_, begin, end);
                        mirror(k[0], begin, end), mirror(k[1], begin, end), at++;
                    } else {
                        compute(*k, of_row, begin, end);
                    }
                }
            });
        }
        return units_.at(network_.result);
    }

    // Computes some rows of an instruction, or groups of rows.
    void compute(const Instruction& k, const float* of_row, int64_t first, int64_t end) {
        if (k.operation == LINEAR)
            product(k, of_row, first, end);
        else if (k.operation >= MEAN)
            run_groups(k, units_, first, end);
        else
            run_elements(k, units_, of_row, first, end);
        mirror(k, first, end);
    }

    // Writes rows of a result to where products of few samples read them.
    void mirror(const Instruction& k, int64_t first, int64_t end) {
        if (!few_ || !k.feeds_linear) return;
        const int64_t each = k.operation == LAYER_NORM || k.operation == RMS_NORM ? k.depth : 1;
        to_rows(units_.to(k.out + first * each), (end - first) * each, k.out + first * each);
    }

    // out = start + weights a.
    void product(const Instruction& k, const float* of_row, int64_t first, int64_t end) {
        const float* w = k.weights + first * k.w_row;
        const float* start = k.b_kind == CONSTANT ? k.constant + first : k.b_kind == OF_ROW ? of_row + k.b + first : nullptr;
        float* c = units_.to(k.out + first);
        if (k.b_kind == UNITS && k.b != k.out) std::copy_n(units_.at(k.b + first), (end - first) * width_, c);
        if (few_ && k.w_column == 1) {
            const bool adds = k.b_kind == UNITS;
            multiply(Dots{w, k.w_row, rows_ + k.a, network_.units, c, width_, k.depth, start, adds}, end - first, here_);
            return;
        }
        Product p{w, k.w_row, k.w_column, units_.at(k.a), width_, c, width_, k.depth, {}};
        p.start.of_row = start, p.start.from_c = k.b_kind == UNITS;
        multiply(p, end - first, width_);
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

    // Copies ``count`` units [units, samples] to columns of [samples, units], from column ``unit`` on.
    void to_rows(const float* from, int64_t count, int64_t unit) {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t i = 0; i < count; i++) rows_[s * network_.units + unit + i] = from[i * width_ + s];
    }

    // Reads the block's part of [batch, count]; zeros if ``from`` is null, and for samples beyond the batch.
    void read(const float* from, int64_t count, float* to) {
        for (int64_t e = 0; e < count; e++)
            for (int64_t s = 0; s < width_; s++)
                to[e * width_ + s] = from && s < here_ ? from[(first_ + s) * count + e] : 0.0f;
    }

    void write(const float* from, float* to) {
        for (int64_t s = 0; s < here_; s++)
            for (int64_t e = 0; e < dim_; e++) to[(first_ + s) * dim_ + e] = from[e * width_ + s];
    }

    const Network& network_;
    const Trajectory& run_;
    const bool shared_;
    Barrier barrier_;
    const int m_;
    const int64_t dim_, width_, size_;  // of a slot
    int64_t first_ = 0, here_ = 0;
    Keys keys_[MOST_SAMPLES / LANES];
    Buffer state_, mixture_, noise_, memory_;
    Units units_;
    float* slots_[MAX_SLOTS];
    const float* input_ = nullptr;
    const bool few_;
    Buffer rows_;  // for few samples: what products read, as [samples, units]
};

}  // namespace

// Takes the samples ``first`` to ``end - 1`` of a batch through the rows ``first_row`` to ``end_row - 1``, and writes
// slot 0 to ``out`` [batch, dim], the other slots to ``others`` [m - 1, batch, dim], and every ``every``-th state to
// ``states`` [rows / every + 1, batch, dim].
//
// table is [rows, 2 + 5 m + m^2], vectors [end_row - first_row, of_row], given [batch, conditions]. A call that does not
// start with row 0 continues from ``out`` and ``others`` as an earlier call left them. Nullable: x_init (then drawn),
// states, vectors and given if they are empty, and ``others`` if one call takes all rows. clip is infinite if there is
// none.
extern "C" int fastsde_mlp_sampler(const Instruction* program, int64_t length, int64_t units, int64_t conditions,
                                   int64_t dim, int64_t result, const float* given, const float* vectors,
                                   int64_t of_row, const float* table, int64_t m, int64_t first_row, int64_t end_row,
                                   const int64_t* keys, const float* x_init, float clip, int64_t first, int64_t end,
                                   int64_t batch, int64_t every, float* states, float* others, float* out,
                                   int threads) {
    return with_status([&] {
        for (int64_t i = 0; i < length; i++)
            known<Operation>(program[i].operation), known<Activation>(program[i].activation);
        const Network network{program, length, units, conditions, dim, result, given, vectors, of_row};
        const Trajectory run{table, m, first_row, end_row, keys, x_init, clip, end, batch, every, states, others, out};
        const int64_t least = std::min(MOST_SAMPLES, padded(end - first));
        if (ceil_div(end - first, COLUMNS) < threads && network.products() * least >= SHARED_PRODUCTS * threads) {
            Samples samples(network, run, least, true);
            run_team(threads, [&] {
                for (int64_t at = first; at < end; at += least) samples.run(at);
            });
            return;
        }
        int64_t width = MOST_SAMPLES;  // fewer if some threads would have nothing to do
        while (width > COLUMNS && ceil_div(end - first, width) < threads) width /= 2;
        const int64_t blocks = ceil_div(end - first, width), team = std::min<int64_t>(threads, blocks);
        PerThread<Samples> samples((int)team, network, run, width, false);
        run_team((int)team, [&] {
#pragma omp for schedule(dynamic) nowait
            for (int64_t i = 0; i < blocks; i++) samples.mine().run(first + i * width);
        });
    });
}

extern "C" int fastsde_operation(const char* name, int) { return code_of<Operation>(name); }
extern "C" int fastsde_activation(const char* name, int) { return code_of<Activation>(name); }
extern "C" int fastsde_instruction_bytes(int) { return sizeof(Instruction); }
