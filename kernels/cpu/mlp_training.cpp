// Training steps of a small network (the twin of fastsde.reference.train_step, with Adam and a moving average).
//
// The network is a program (fastsde/lowering/program.py), in which the time is one more input. The batch is cut into
// blocks of samples, whose values [samples, units], and the gradients of these, stay in the cache: all values of a
// sample lie in one row, each at a multiple of COLUMNS. Each slot of gradients belongs to a run of consecutive blocks,
// so that the weights do not depend on the number of threads. With d the gradient of an instruction's result:
//
//     linear: out = a W^T + b,   dW = d^T a,   da = d W;   elementwise: out = g(a, b),   da = d dg/da,   db = d dg/db
//
// A step has two barriers (team.h): after the gradients, and after the update of the weights.

#include "backward.h"
#include "codes.h"
#include "objective.h"
#include "trained.h"

using namespace fastsde;

namespace {

constexpr int64_t BLOCK_SAMPLES = 32;
constexpr int64_t MAX_SLOTS = 16;

struct Task {
    Data data;
    const Coefficients* coefficients;  // [steps, batch]
    const int64_t* keys;
    int64_t batch, dim;
    const Trained* program;
    int64_t length, row, slopes, result;  // units of a row, and of a row of slopes; where the network's output is
    const int64_t* zeros;                 // runs (first, count) of a row of gradients that start as zeros
    int64_t runs, widest;

    double elements() const { return (double)batch * (double)dim; }
};

// Computes the gradients of a block, in the memory of one thread.
class GradientsOfBlock {
  public:
    GradientsOfBlock(const Task& task, Parameters& parameters)
        : task_(task), parameters_(parameters), noise_(BLOCK_SAMPLES * task.dim), clean_(BLOCK_SAMPLES * task.dim),
          values_(BLOCK_SAMPLES * task.row + COLUMNS), gradients_(BLOCK_SAMPLES * task.row + COLUMNS),
          slopes_(BLOCK_SAMPLES * task.slopes), spare_(BLOCK_SAMPLES * padded(task.widest)) {}

    // Writes a block's gradients, or adds them; returns the sum of its squared residuals.
    //
    // ``step`` counts from the first step of the call, ``number`` is the step that random numbers depend on.
    double run(int64_t block, int64_t step, int64_t number, float* gradients, bool adds) {
        first_ = block * BLOCK_SAMPLES, here_ = std::min(BLOCK_SAMPLES, task_.batch - first_);
        to_ = gradients, adds_ = adds;
        draw(step, number);
        for (int64_t i = 0; i < task_.length; i++) forward(task_.program[i]);
        for (int64_t s = 0; s < here_; s++)
            for (int64_t i = 0; i < task_.runs; i++)
                std::fill_n(gradients_ + s * task_.row + task_.zeros[2 * i], task_.zeros[2 * i + 1], 0.0f);
        const double sum = residuals();
        for (int64_t i = task_.length; i-- > 0;)
            if (task_.program[i].needs_gradient) backward(task_.program[i]);
        return sum;
    }

  private:
    // Writes x_in and tau to the first units, and x_0 and z for the loss.
    __attribute__((noinline)) void draw(int64_t step, int64_t number) {
        const Task& on = task_;
        const int64_t dim = on.dim;
        draw_normals(on.keys, draw_offset(number, TRAINING_NOISE), Part{first_, here_, 0, dim}, on.batch, noise_);
        coefficients_ = on.coefficients + step * on.batch + first_;
        for_lanes(here_, [&](int64_t first, int64_t here) {
            const Keys keys = Keys::load(on.keys, first_ + first, on.batch);
            const Floats order = uniforms_across(keys, draw_offset(number, DATA_ORDER));
            for (int64_t i = 0; i < here; i++) {
                const Coefficients k = coefficients_[first + i];
                float *x_0 = clean_ + (first + i) * dim, *x_in = values_ + (first + i) * on.row;
                const float* z = noise_ + (first + i) * dim;
                on.data.read_row((int64_t)((double)order[i] * (double)on.data.rows), 0, dim, x_0);
                noise_sample(k, x_0, z, dim, x_in);
                x_in[dim] = k.tau;
            }
        });
    }

    // Writes the gradient of f; returns the sum of the squared residuals.
    __attribute__((noinline)) double residuals() {
        const Task& on = task_;
        const float outer = (float)(2.0 / on.elements());
        double sum = 0;
        for (int64_t i = 0; i < here_; i++) {
            const Coefficients k = coefficients_[i];
            const float *x_0 = clean_ + i * on.dim, *z = noise_ + i * on.dim, *f = values_ + i * on.row + on.result;
            sum += squared_residuals<true>(k, f, x_0, z, on.dim, outer * k.w_f, gradients_ + i * on.row + on.result);
        }
        return sum;
    }

    void forward(const Trained& k) {
        if (k.operation != LINEAR) {
            const Rows rows{values_, task_.row, slopes_, task_.slopes, here_, vector(k)};
            return fastsde::forward(k, rows);
        }
        const int64_t out_padded = parameters_.places[k.matrix].rows_padded;
        Product p{values_ + k.a, task_.row, 1, parameters_.transposed + parameters_.places[k.matrix].transposed,
                  out_padded, values_ + k.out, task_.row, k.a_width, {}};
        p.start.of_column = vector(k);
        p.start.from_c = k.b_kind == UNITS;
        if (k.b_kind == UNITS && k.b != k.out)
            for (int64_t s = 0; s < here_; s++) {
                float* row = values_ + s * task_.row;
                std::copy_n(row + k.b, k.width, row + k.out);
            }
        multiply(p, here_, out_padded);
    }

    void backward(const Trained& k) {
        if (k.operation != LINEAR) {
            const Rows rows{values_, task_.row, slopes_, task_.slopes, here_, vector(k)};
            return fastsde::backward(k, rows, gradients_, gradient_of_vector(k), adds_);
        }
        const Place& place = parameters_.places[k.matrix];
        const int64_t row = task_.row;
        const float* d = gradients_ + k.out;
        if (parameters_.items[k.matrix].trains) {
            Product p{d, 1, row, values_ + k.a, row, to_ + place.weight, place.padded, here_, {}};
            p.start.from_c = adds_;
            multiply(p, k.width, place.padded);
            if (!k.a_is_whole)  // the padding of its rows took part in the product
                for (int64_t o = 0; o < k.width; o++)
                    std::fill_n(to_ + place.weight + o * place.padded + k.a_width, place.padded - k.a_width, 0.0f);
        }
        if (float* to = gradient_of_vector(k)) add_rows(d, k.width, to);
        if (k.b_gradient && k.b != k.out)
            for (int64_t s = 0; s < here_; s++)
                give(d + s * row, gradients_ + s * row + k.b, k.width, k.b_gradient);
        if (!k.a_gradient) return;
        Product p{d, row, 1, parameters_.weights + place.weight, place.padded, gradients_ + k.a, row, k.width, {}};
        if (k.a_is_whole) {
            p.start.from_c = k.a_gradient == ADDS;
            return multiply(p, here_, place.padded);
        }
        p.c = spare_, p.c_row = place.padded;
        multiply(p, here_, place.padded);
        for (int64_t s = 0; s < here_; s++)
            give(spare_ + s * place.padded, gradients_ + s * row + k.a, k.a_width, k.a_gradient);
    }

    // Adds the sum over the samples of rows to the gradient of a vector.
    void add_rows(const float* rows, int64_t width, float* to) {
        for_lanes(width, [&](int64_t i, int64_t here) {
            Floats sum = adds_ ? load(to + i, here) : Floats{};
            for (int64_t s = 0; s < here_; s++) sum += load(rows + s * task_.row + i, here);
            store(to + i, sum, here);
        });
    }

    const float* vector(const Trained& k) {
        return k.vector < 0 ? nullptr : parameters_.weights + parameters_.places[k.vector].weight;
    }

    float* gradient_of_vector(const Trained& k) {
        return k.vector < 0 || !parameters_.items[k.vector].trains ? nullptr
                                                                  : to_ + parameters_.places[k.vector].weight;
    }

    const Task& task_;
    Parameters& parameters_;
    int64_t first_ = 0, here_ = 0;
    float* to_ = nullptr;
    bool adds_ = false;
    const Coefficients* coefficients_ = nullptr;
    Buffer noise_, clean_, values_, gradients_, slopes_, spare_;
};

}  // namespace

// Takes the steps ``first`` to ``first + count - 1`` in place; Adam has taken ``taken`` steps before. table [count,
// batch, 6]: the coefficients. rates [count, 2]: the learning rate of a step, and the fraction by which the moving
// average moves. Nullable: moving.
extern "C" int fastsde_mlp_training(const Trained* program, int64_t length, int64_t row, int64_t slopes, int64_t dim,
                                    int64_t result, const int64_t* zeros, int64_t runs, const Item* items,
                                    int64_t count_of_items, TensorList weights, TensorList average,
                                    TensorList square, TensorList moving, const void* x_0, int bytes, int64_t rows,
                                    float scale, float shift, const int64_t* keys, int64_t batch, const float* table,
                                    double beta1, double beta2, double epsilon, int64_t first, int64_t count,
                                    int64_t taken, const float* rates, float* losses, int threads) {
    const int64_t blocks = ceil_div(batch, BLOCK_SAMPLES), blocks_each = ceil_div(blocks, MAX_SLOTS);
    const int64_t slots = ceil_div(blocks, blocks_each);
    threads = (int)std::min<int64_t>(threads, slots);
    return with_status([&] {
        int64_t widest = 1;
        for (int64_t i = 0; i < length; i++) {
            known<Operation>(program[i].operation), known<Activation>(program[i].activation);
            widest = std::max(widest, program[i].a_width);
        }
        const Data data{x_0, bytes != 0, nullptr, rows, dim, scale, shift};
        const Task task{data, (const Coefficients*)table, keys, batch, dim, program, length, row, slopes, result,
                        zeros, runs, widest};
        Parameters parameters(count_of_items, items, slots);
        std::vector<double> sums(blocks);
        PerThread<GradientsOfBlock> gradients(threads, task, parameters);
        parameters.read(weights, average, square, moving);
        Barrier barrier;
        const auto take = [&](int64_t i) {
#pragma omp for schedule(static) nowait
            for (int64_t slot = 0; slot < slots; slot++)
                for (int64_t b = slot * blocks_each; b < std::min(blocks, (slot + 1) * blocks_each); b++)
                    sums[b] = gradients.mine().run(b, i, first + i, parameters.gradients + slot * parameters.size,
                                                   b > slot * blocks_each);
            barrier.wait();
            const AdamStep step(beta1, beta2, epsilon, taken + i + 1, rates[2 * i], rates[2 * i + 1]);
#pragma omp for schedule(static) nowait
            for (int64_t b = 0; b < (int64_t)parameters.bands.size(); b++) {
                parameters.update(parameters.bands[b], step);
                if (b == 0) {
                    double sum = 0;
                    for (const double of_block : sums) sum += of_block;
                    losses[i] = (float)(sum / task.elements());
                }
            }
            barrier.wait();
        };
        run_team(threads, [&] {
            for (int64_t i = 0; i < count; i++) take(i);
        });
        parameters.write(weights, average, square, moving);
    });
}
