// The parameters of a network in training: matrices, with rows padded to COLUMNS, their transpose, and vectors; Adam's
// averages, the moving average, and the gradients, in slots that are added in order.

#pragma once

#include <vector>

#include "gemm.h"
#include "memory.h"
#include "parts.h"

namespace fastsde {

// A matrix [rows, columns] or a vector [1, columns], as the caller writes it: a field of _Item in mlp_training.py each.
// The strides are those of the caller's tensors.
struct Item {
    int64_t rows, columns, row_stride, column_stride;
    int64_t is_vector, trains;
};

// Where an item is in the buffers of all items.
struct Place {
    int64_t padded, rows_padded, weight, transposed;
};

// The caller's tensors of one kind, one of each item; null where there is none.
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
    // COLUMNS rows of an item that trains, from ``row`` on.
    struct Band {
        int64_t item, row;
    };

    Parameters(int64_t count, const Item* items, int64_t slots)
        : items(items, items + count), places(plan(this->items)), size(end(&Place::weight)), slots(slots),
          weights(size), transposed(end(&Place::transposed)), gradients(slots * size), average_(size), square_(size),
          moving_(size) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t row = 0; items[i].trains && row < items[i].rows; row += COLUMNS) bands.push_back({i, row});
    }

    void read(TensorList weight, TensorList average, TensorList square, TensorList moving) {
        moves_ = moving != nullptr;
        exchange(weight, weights, true), exchange(average, average_, true), exchange(square, square_, true);
        if (moves_) exchange(moving, moving_, true);
        for (int64_t i = 0; i < (int64_t)items.size(); i++)
            for (int64_t row = 0; row < items[i].rows; row += COLUMNS) transpose({i, row});
    }

    void write(TensorList weight, TensorList average, TensorList square, TensorList moving) {
        exchange(weight, weights, false), exchange(average, average_, false), exchange(square, square_, false);
        if (moves_) exchange(moving, moving_, false);
    }

    void update(const Band& band, const AdamStep& step) {
        const Place& place = places[band.item];
        adam(place.weight + band.row * place.padded, rows(band) * place.padded, step);
        transpose(band);
    }

    // ``weights`` and each slot of the gradients have an item at its place, [rows, padded].
    const std::vector<Item> items;
    const std::vector<Place> places;
    const int64_t size, slots;
    std::vector<Band> bands;
    Buffer weights, transposed, gradients;

  private:
    static std::vector<Place> plan(const std::vector<Item>& items) {
        std::vector<Place> places;
        int64_t at = 0, transposed = 0;
        for (const Item& item : items) {
            places.push_back({padded(item.columns), padded(item.rows), at, transposed});
            at += item.rows * places.back().padded;
            transposed += item.is_vector ? 0 : item.columns * places.back().rows_padded;
        }
        places.push_back({0, 0, at, transposed});
        return places;
    }

    int64_t end(int64_t Place::* offset) const { return places.back().*offset; }

    int64_t rows(const Band& band) const { return std::min(COLUMNS, items[band.item].rows - band.row); }

    // Copies from the caller's tensors to ours (``reads``), or what trains back.
    void exchange(TensorList theirs, float* ours, bool reads) {
        for (size_t i = 0; i < items.size(); i++) {
            const Item& item = items[i];
            if (!theirs[i] || (!reads && !item.trains)) continue;
            for (int64_t row = 0; row < item.rows; row++)
                for (int64_t column = 0; column < item.columns; column++) {
                    float& a = theirs[i][row * item.row_stride + column * item.column_stride];
                    float& b = ours[places[i].weight + row * places[i].padded + column];
                    reads ? b = a : a = b;
                }
        }
    }

    void transpose(const Band& band) {
        if (items[band.item].is_vector) return;
        const Place& place = places[band.item];
        const float* from = weights + place.weight + band.row * place.padded;
        float* to = transposed + place.transposed + band.row;
        for (int64_t k = 0; k < items[band.item].columns; k++)
            for (int64_t o = 0; o < rows(band); o++) to[k * place.rows_padded + o] = from[o * place.padded + k];
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
    bool moves_ = false;
};

}  // namespace fastsde
