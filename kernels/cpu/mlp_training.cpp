// Training steps of an MLP score network (the twin of fastsde.reference.train_step, with Adam and a moving average).
//
// The batch is cut into blocks, whose signals [samples, features], with rows padded to COLUMNS, stay in the cache. Each
// slot of gradients belongs to a run of consecutive blocks, so that the weights do not depend on the number of threads.
// With h_0 = (x_in, tau) and d_l the gradient of layer l:
//
//     h_l = act(h_{l-1} W_l^T + b_l),   dW_l = d_l^T h_{l-1},   d_{l-1} = (d_l W_l) act'
//
// A step has two barriers (team.h): after the gradients, and after the update of the weights.

#include "activations.h"
#include "codes.h"
#include "mlp_parameters.h"
#include "objective.h"

using namespace fastsde;

namespace {

constexpr int64_t BLOCK_SAMPLES = 32;
constexpr int64_t MAX_SLOTS = 16;

struct Task {
    Data data;
    const Coefficients* coefficients;  // [steps, batch]
    const int64_t* keys;
    int64_t batch, dim;

    double elements() const { return (double)batch * (double)dim; }
};

// Computes the gradients of a block, in the memory of one thread.
class GradientsOfBlock {
  public:
    GradientsOfBlock(const Task& task, Parameters& parameters,
                     const std::vector<Activation>& activations)
        : task_(task), parameters_(parameters), layers_(parameters.layers), activations_(activations),
          noise_(BLOCK_SAMPLES * task.dim), clean_(BLOCK_SAMPLES * task.dim),
          signals_(BLOCK_SAMPLES * features()), slopes_(BLOCK_SAMPLES * features()),
          error_(BLOCK_SAMPLES * widest()), next_error_(BLOCK_SAMPLES * widest()) {}

    // Writes a block's gradients, or adds them; returns the sum of its squared residuals.
    //
    // ``step`` counts from the first step of the call, ``number`` is the step that random numbers depend on.
    double run(int64_t block, int64_t step, int64_t number, float* gradients, bool adds) {
        first_ = block * BLOCK_SAMPLES, here_ = std::min(BLOCK_SAMPLES, task_.batch - first_);
        draw(step, number);
        const float* f = forward();
        const double sum = residuals(f);
        backward(gradients, adds);
        return sum;
    }

  private:
    // Writes x_in and tau to the first signal, and x_0 and z for the loss.
    __attribute__((noinline)) void draw(int64_t step, int64_t number) {
        const Task& on = task_;
        const int64_t dim = on.dim, width = layers_[0].in_padded;
        draw_normals(on.keys, draw_offset(number, TRAINING_NOISE), Part{first_, here_, 0, dim}, on.batch, noise_);
        coefficients_ = on.coefficients + step * on.batch + first_;
        for_lanes(here_, [&](int64_t first, int64_t here) {
            const Keys keys = Keys::load(on.keys, first_ + first, on.batch);
            const Floats order = uniforms_across(keys, draw_offset(number, DATA_ORDER));
            for (int64_t i = 0; i < here; i++) {
                const Coefficients k = coefficients_[first + i];
                float *x_0 = clean_ + (first + i) * dim, *x_in = signals_ + (first + i) * width;
                const float* z = noise_ + (first + i) * dim;
                on.data.read_row((int64_t)((double)order[i] * (double)on.data.rows), 0, dim, x_0);
                noise_sample(k, x_0, z, dim, x_in);
                x_in[dim] = k.tau;
            }
        });
    }

    // Computes signals and slopes of all layers in turn; returns the last signal.
    const float* forward() {
        float *signal = signals_, *slope = slopes_;
        for (size_t l = 0; l < layers_.size(); l++) {
            const Layer& layer = layers_[l];
            float* next = signal + BLOCK_SAMPLES * layer.in_padded;
            slope += BLOCK_SAMPLES * layer.in_padded;
            Product product{signal, layer.in_padded, 1, parameters_.transposed + layer.transposed,
                            layer.out_padded, next, layer.out_padded, layer.in, {}};
            product.start.of_column = parameters_.weights + layer.bias;
            multiply(product, here_, layer.out_padded);
            if (l + 1 < layers_.size()) activate(activations_[l], next, slope, here_ * layer.out_padded);
            signal = next;
        }
        return signal;
    }

    // Writes the gradient of f to ``error_``; returns the sum of the squared residuals.
    __attribute__((noinline)) double residuals(const float* f) {
        const Task& on = task_;
        const int64_t width = layers_.back().out_padded;
        const float outer = (float)(2.0 / on.elements());
        double sum = 0;
        for (int64_t i = 0; i < here_; i++) {
            const Coefficients k = coefficients_[i];
            const float *x_0 = clean_ + i * on.dim, *z = noise_ + i * on.dim;
            sum += squared_residuals<true>(k, f + i * width, x_0, z, on.dim, outer * k.w_f, error_ + i * width);
        }
        return sum;
    }

    void backward(float* gradients, bool adds) {
        int64_t end = features();
        float *error = error_, *next = next_error_;
        for (size_t l = layers_.size(); l-- > 0;) {
            const Layer& layer = layers_[l];
            end -= layer.out_padded;
            const int64_t start = BLOCK_SAMPLES * (end - layer.in_padded);  // of the layer's input
            Product product{error, 1, layer.out_padded, signals_ + start, layer.in_padded,
                            gradients + layer.weight, layer.in_padded, here_, {}};
            product.start.from_c = adds;
            multiply(product, layer.out, layer.in_padded);
            add_rows(error, layer.out_padded, gradients + layer.bias, adds);
            if (l == 0) return;
            multiply(Product{error, layer.out_padded, 1, parameters_.weights + layer.weight, layer.in_padded, next,
                             layer.in_padded, layer.out, {}},
                     here_, layer.in_padded);
            for (int64_t i = 0; i < here_ * layer.in_padded; i += LANES)
                store(next + i, load(next + i) * load(slopes_ + start + i));
            std::swap(error, next);
        }
    }

    void add_rows(const float* rows, int64_t width, float* to, bool adds) {
        for (int64_t i = 0; i < width; i += LANES) {
            Floats sum = adds ? load(to + i) : Floats{};
            for (int64_t s = 0; s < here_; s++) sum += load(rows + s * width + i);
            store(to + i, sum);
        }
    }

    int64_t features() const {
        int64_t sum = layers_[0].in_padded;
        for (const Layer& layer : layers_) sum += layer.out_padded;
        return sum;
    }

    int64_t widest() const {
        int64_t most = 0;
        for (const Layer& layer : layers_) most = std::max({most, layer.in_padded, layer.out_padded});
        return most;
    }

    const Task& task_;
    Parameters& parameters_;
    const std::vector<Layer>& layers_;
    const std::vector<Activation>& activations_;
    int64_t first_ = 0, here_ = 0;
    const Coefficients* coefficients_ = nullptr;
    Buffer noise_, clean_, signals_, slopes_, error_, next_error_;
};

}  // namespace

// Takes the steps ``first`` to ``first + count - 1`` in place; Adam has taken ``taken`` steps before. widths: of h_0,
// ..., f. table [count, batch, 6]: the coefficients. rates [count, 2]: the learning rate of a step, and the fraction by
// which the moving average moves. Nullable: moving.
extern "C" int fastsde_mlp_training(int64_t layers, const int64_t* widths, const int32_t* activations,
                                    TensorList weights, TensorList average, TensorList square, TensorList moving,
                                    const void* x_0, int bytes, int64_t rows, float scale, float shift,
                                    const int64_t* keys, int64_t batch, const float* table, double beta1,
                                    double beta2, double epsilon, int64_t first, int64_t count, int64_t taken,
                                    const float* rates, float* losses, int threads) {
    const int64_t dim = widths[layers];
    const int64_t blocks = ceil_div(batch, BLOCK_SAMPLES), blocks_each = ceil_div(blocks, MAX_SLOTS);
    const int64_t slots = ceil_div(blocks, blocks_each);
    threads = (int)std::min<int64_t>(threads, slots);
    return with_status([&] {
        const Data data{x_0, bytes != 0, nullptr, rows, dim, scale, shift};
        const Task task{data, (const Coefficients*)table, keys, batch, dim};
        const std::vector<Activation> kinds = known_activations(activations, layers - 1);
        Parameters parameters(layers, widths, slots);
        std::vector<double> sums(blocks);
        PerThread<GradientsOfBlock> gradients(threads, task, parameters, kinds);
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
