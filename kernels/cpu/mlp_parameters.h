// The parameters of an MLP in training, with rows padded to COLUMNS: weights, their transpose, Adam's averages, the
// moving average, and the gradients, in slots that are added in order.

#pragma once

#include <vector>

#include "gemm.h"
#include "memory.h"
#include "parts.h"

namespace fastsde {

// The offsets of a layer's weights [out, in], bias and transposed weights in the buffers of all layers.
struct Layer {
    int64_t in, out, in_padded, out_padded, weight, bias, transposed;
};

// The caller's tensors of one kind, for w_1, b_1, w_2, b_2, ...; those for biases may be null.
using TensorList = float* const*;

// Adam (Kingma & Ba 2015) as PyTorch rounds it: the factors of one step.
struct AdamStep {
    float gradient, square_kept, square_new, rate, root, epsilon, moves;

    AdamStep(double beta1, double beta2, double epsilon, int64_t step, float learning_rate, float moves)
        : gradient((float)(1 - beta1)), square_kept((float)beta2), square_new((float)(1 - beta2)),
          rate((float)(learning_rate / (1 - std::pow(beta1, (double)step)))),
          root((float)std::sqrt(1 - std::pow(beta2, (double)step))), epsilon((float)epsilon), moves(moves) {}
};

class Parameters {
  public:
    // COLUMNS outputs of a layer, starting at ``row``.
    struct Band {
        size_t layer;
        int64_t row;
    };

    Parameters(int64_t count, const int64_t* widths, int64_t slots)
        : layers(plan(count, widths)), size(layers.back().bias + layers.back().out_padded), slots(slots),
          weights(size), transposed(layers.back().transposed + layers.back().in * layers.back().out_padded),
          gradients(slots * size), average_(size), square_(size), moving_(size) {
        for (size_t l = 0; l < layers.size(); l++)
            for (int64_t row = 0; row < layers[l].out; row += COLUMNS) bands.push_back({l, row});
    }

    void read(TensorList weight, TensorList average, TensorList square, TensorList moving) {
        moves_ = moving != nullptr;
        for (size_t l = 0; l < layers.size(); l++) has_bias_.push_back(weight[2 * l + 1] != nullptr);
        exchange(weight, weights, true), exchange(average, average_, true), exchange(square, square_, true);
        if (moves_) exchange(moving, moving_, true);
        for (const Band& band : bands) transpose(band);
    }

    void write(TensorList weight, TensorList average, TensorList square, TensorList moving) {
        exchange(weight, weights, false), exchange(average, average_, false), exchange(square, square_, false);
        if (moves_) exchange(moving, moving_, false);
    }

    void update(const Band& band, const AdamStep& step) {
        const Layer& layer = layers[band.layer];
        adam(layer.weight + band.row * layer.in_padded, rows(band) * layer.in_padded, step);
        if (has_bias_[band.layer]) adam(layer.bias + band.row, COLUMNS, step);
        transpose(band);
    }

    const std::vector<Layer> layers;
    const int64_t size, slots;
    std::vector<Band> bands;
    Buffer weights, transposed, gradients;  // gradients [slots, size]

  private:
    static std::vector<Layer> plan(int64_t count, const int64_t* widths) {
        std::vector<Layer> layers;
        int64_t at = 0, transposed = 0;
        for (int64_t l = 0; l < count; l++) {
            Layer layer{widths[l], widths[l + 1], padded(widths[l]), padded(widths[l + 1]), at, 0, transposed};
            layer.bias = at + layer.out * layer.in_padded;
            at = layer.bias + layer.out_padded;
            transposed += layer.in * layer.out_padded;
            layers.push_back(layer);
        }
        return layers;
    }

    int64_t rows(const Band& band) const { return std::min(COLUMNS, layers[band.layer].out - band.row); }

    // Copies from the caller's tensors to ours (``reads``), or back.
    void exchange(TensorList theirs, float* ours, bool reads) {
        const auto copy = [reads](float* a, float* b, int64_t count) {
            reads ? std::copy(a, a + count, b) : std::copy(b, b + count, a);
        };
        for (size_t l = 0; l < layers.size(); l++) {
            const Layer& layer = layers[l];
            for (int64_t o = 0; o < layer.out; o++)
                copy(theirs[2 * l] + o * layer.in, ours + layer.weight + o * layer.in_padded, layer.in);
            if (has_bias_[l]) copy(theirs[2 * l + 1], ours + layer.bias, layer.out);
        }
    }

    void transpose(const Band& band) {
        const Layer& layer = layers[band.layer];
        const float* from = weights + layer.weight + band.row * layer.in_padded;
        float* to = transposed + layer.transposed + band.row;
        for (int64_t k = 0; k < layer.in; k++)
            for (int64_t o = 0; o < rows(band); o++) to[k * layer.out_padded + o] = from[o * layer.in_padded + k];
    }

    void adam(int64_t start, int64_t count, const AdamStep& by) {
        for (int64_t i = start; i < start + count; i += LANES) {
            Floats gradient = load(gradients + i);
            for (int64_t slot = 1; slot < slots; slot++) gradient += load(gradients + slot * size + i);
            Floats average = load(average_ + i), square = load(square_ + i), weight = load(weights + i);
            average += by.gradient * (gradient - average);
            square = by.square_kept * square + by.square_new * gradient * gradient;
            weight -= by.rate * average / (square_root(square) / by.root + by.epsilon);
            store(average_ + i, average), store(square_ + i, square), store(weights + i, weight);
            if (moves_) {
                const Floats moving = load(moving_ + i);
                store(moving_ + i, moving + by.moves * (weight - moving));
            }
        }
    }

    Buffer average_, square_, moving_;
    std::vector<bool> has_bias_;
    bool moves_ = false;
};

}  // namespace fastsde
