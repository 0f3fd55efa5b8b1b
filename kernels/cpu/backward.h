// Elementwise instructions, norms and means of a program in training: values are rows of units, one row per sample, and
// each instruction has a gradient. The loops run along the units.

#pragma once

#include "program.h"

namespace fastsde {

// How the gradient of an operand is given: not at all, or written, or added.
enum Gives : int64_t { NOTHING_TO_GIVE = 0, WRITES = 1, ADDS = 2 };

// An instruction as the caller writes it: a field of _Trained in mlp_training.py each. Offsets are units of a row.
struct Trained {
    int64_t operation, activation;
    int64_t out, width;
    int64_t a, a_step, a_width, a_is_whole, a_gradient;
    int64_t b_kind, b, b_step, b_gradient;  // NO_OPERAND, UNITS, or CONSTANT: a vector
    int64_t matrix, vector;                 // items, or -1
    int64_t slope;                          // where the derivative of an activation is kept
    int64_t groups, needs_gradient;
    float parameters[2];
};

// The values of a block.
struct Rows {
    float* values;
    int64_t row;
    float* slopes;
    int64_t slope_row, samples;
    const float* vector;  // the second operand, if it is one
};

static inline void give(const float* d, float* to, int64_t count, int64_t how) {
    for_lanes(count, [&](int64_t i, int64_t here) {
        const Floats given = load(d + i, here);
        store(to + i, how == ADDS ? load(to + i, here) + given : given, here);
    });
}

// The two operands of an instruction in one sample.
struct Operands {
    const Trained& k;
    const float *a, *b;

    Operands(const Trained& k, const Rows& rows, int64_t sample)
        : k(k), a(rows.values + sample * rows.row + k.a),
          b(k.b_kind == UNITS ? rows.values + sample * rows.row + k.b : rows.vector) {}

    Floats first(int64_t i, int64_t here) const { return k.a_step ? load(a + i, here) : all(*a); }
    Floats second(int64_t i, int64_t here) const {
        return k.b_kind == UNITS && !k.b_step ? all(*b) : b ? load(b + i, here) : Floats{};
    }
};

template <Activation KIND>
static inline void activate(const Trained& k, const Rows& rows) {
    const float parameter = k.parameters[0];
    for (int64_t s = 0; s < rows.samples; s++) {
        const Operands from(k, rows, s);
        float *out = rows.values + s * rows.row + k.out, *slopes = rows.slopes + s * rows.slope_row + k.slope;
        if (k.a_step) {
            for_lanes(k.width, [&](int64_t i, int64_t here) {
                Floats value, slope;
                activate<KIND>(load(from.a + i, here), parameter, value, slope);
                store(out + i, value, here), store(slopes + i, slope);  // slopes are padded
            });
            continue;
        }
        Floats value, slope;
        activate<KIND>(all(*from.a), parameter, value, slope);
        for_lanes(k.width, [&](int64_t i, int64_t here) { store(out + i, value, here), store(slopes + i, slope); });
    }
}

// Gives the gradient of an activation's operand.
static inline void backward_of_activation(const Trained& k, const Rows& rows, float* gradients) {
    for (int64_t s = 0; s < rows.samples; s++) {
        float *d = gradients + s * rows.row, *to = d + k.a;
        const float *given = d + k.out, *slopes = rows.slopes + s * rows.slope_row + k.slope;
        if (k.a_step) {
            for_lanes(k.width, [&](int64_t i, int64_t here) {
                const Floats by_a = load(given + i, here) * load(slopes + i);
                store(to + i, k.a_gradient == ADDS ? load(to + i, here) + by_a : by_a, here);
            });
            continue;
        }
        Floats sum{};
        for_lanes(k.width, [&](int64_t i, int64_t here) { sum += load(given + i, here) * load(slopes + i, here); });
        *to = (k.a_gradient == ADDS ? *to : 0.0f) + sum_of(sum);
    }
}

// Returns what an elementwise operation other than an activation computes.
static inline Floats computed(const Trained& k, Floats a, Floats b) {
    const float p = k.parameters[0], q = k.parameters[1];
    switch ((Operation)k.operation) {
        case ADD: return a + b;
        case SUBTRACT: return a - b;
        case MULTIPLY: return a * b;
        case DIVIDE: return a / b;
        case FILL: return b;
        case AFFINE: return a * p + q;
        case CLAMP: return at_least(at_most(a, q), p);
        case EXP: return exp(a);
        case SQRT: return square_root(a);
        case RSQRT: return 1.0f / square_root(a);
        case RECIPROCAL: return 1.0f / a;
        case ABS: return absolute(a);
        case ERF: return erf(a);
        case COS: {
            Floats sine, cosine;
            sin_cos(a, sine, cosine);
            return cosine;
        }
        case LINEAR: case ACTIVATION: case MEAN: case LAYER_NORM: case RMS_NORM: break;
    }
    return a;
}

// Returns the derivatives by both operands; ``out`` is the result.
static inline void derivatives(const Trained& k, Floats a, Floats b, Floats out, Floats& by_a, Floats& by_b) {
    const Floats one = all(1.0f);
    const float p = k.parameters[0], q = k.parameters[1];
    by_a = by_b = one;
    switch ((Operation)k.operation) {
        case ADD: case FILL: return;
        case SUBTRACT: by_b = -one; return;
        case MULTIPLY: by_a = b, by_b = a; return;
        case DIVIDE: by_a = one / b, by_b = -out / b; return;
        case AFFINE: by_a = all(p); return;
        case CLAMP: by_a = a < p ? Floats{} : a > q ? Floats{} : one; return;
        case EXP: by_a = out; return;
        case SQRT: by_a = 0.5f / out; return;
        case RSQRT: by_a = -0.5f * out / a; return;
        case RECIPROCAL: by_a = -out * out; return;
        case ABS: by_a = a < 0.0f ? -one : a > 0.0f ? one : Floats{}; return;
        case ERF: by_a = 1.12837917f * exp2_negative(a * a * -1.44269504f); return;
        case COS: {
            Floats sine, cosine;
            sin_cos(a, sine, cosine);
            by_a = -sine;
            return;
        }
        case LINEAR: case ACTIVATION: case MEAN: case LAYER_NORM: case RMS_NORM: return;
    }
}

// Runs body(a, out, count) for each group of a mean or a norm, with the first units of its operand and result.
template <class Body>
static inline void for_groups(const Trained& k, Body body) {
    const int64_t count = k.a_width / k.groups, each = k.operation == MEAN ? 1 : count;
    for (int64_t group = 0; group < k.groups; group++) body(k.a + group * count, k.out + group * each, count);
}

static inline float sum_of_row(const float* from, int64_t count) {
    Floats sum{};
    for_lanes(count, [&](int64_t i, int64_t here) { sum += load(from + i, here); });
    return sum_of(sum);
}

// Returns 1 / sqrt(mean of (a - mean)^2 + epsilon).
static inline float scale_of(const Trained& k, const float* a, int64_t count, float mean) {
    Floats squares{};
    for_lanes(count, [&](int64_t i, int64_t here) {
        Floats off = load(a + i, here) - mean;
        if (here < LANES)
            for (int64_t lane = here; lane < LANES; lane++) off[lane] = 0.0f;
        squares += off * off;
    });
    return 1.0f / std::sqrt(sum_of(squares) / (float)count + k.parameters[0]);
}

static inline void forward(const Trained& k, const Rows& rows) {
    if (k.operation == ACTIVATION) {
        switch ((Activation)k.activation) {
#define FASTSDE_CASE(member, name) \
    case member: return activate<member>(k, rows);
            FASTSDE_ACTIVATIONS(FASTSDE_CASE)
#undef FASTSDE_CASE
        }
    }
    for (int64_t s = 0; s < rows.samples; s++) {
        float* row = rows.values + s * rows.row;
        if (k.operation < MEAN) {
            const Operands from(k, rows, s);
            for_lanes(k.width, [&](int64_t i, int64_t here) {
                store(row + k.out + i, computed(k, from.first(i, here), from.second(i, here)), here);
            });
            continue;
        }
        for_groups(k, [&](int64_t a, int64_t out, int64_t count) {
            const float mean = k.operation == RMS_NORM ? 0.0f : sum_of_row(row + a, count) / (float)count;
            if (k.operation == MEAN) {
                row[out] = mean;
                return;
            }
            const float scale = scale_of(k, row + a, count, mean);
            for_lanes(count, [&](int64_t i, int64_t here) {
                store(row + out + i, (load(row + a + i, here) - mean) * scale, here);
            });
        });
    }
}

// Gives the gradient of a group: of a mean d / count, of a norm scale (d - mean d - out mean(d out)), where only
// layer_norm has the middle term.
static inline void backward_of_group(const Trained& k, const float* values, const float* d, int64_t a, int64_t out,
                                     int64_t count, float* to) {
    const float share = 1.0f / (float)count;
    float mean_d = 0.0f, mean_product = 0.0f, scale = share;
    if (k.operation != MEAN) {
        Floats sum{};
        for_lanes(count, [&](int64_t i, int64_t here) {
            sum += load(d + out + i, here) * load(values + out + i, here);
        });
        mean_product = sum_of(sum) * share;
        mean_d = k.operation == LAYER_NORM ? sum_of_row(d + out, count) * share : 0.0f;
        const float mean = k.operation == LAYER_NORM ? sum_of_row(values + a, count) * share : 0.0f;
        scale = scale_of(k, values + a, count, mean);
    }
    for_lanes(count, [&](int64_t i, int64_t here) {
        const Floats given = k.operation == MEAN
                                 ? all(d[out] * share)
                                 : scale * (load(d + out + i, here) - mean_d - load(values + out + i, here) * mean_product);
        store(to + i, k.a_gradient == ADDS ? load(to + i, here) + given : given, here);
    });
}

// Gives the gradients of an instruction's operands. ``of_vector``: the gradient of its vector, or null.
static inline void backward(const Trained& k, const Rows& rows, float* gradients, float* of_vector, bool adds) {
    if (k.operation == ACTIVATION) return backward_of_activation(k, rows, gradients);
    for (int64_t s = 0; s < rows.samples; s++) {
        const float* values = rows.values + s * rows.row;
        float* d = gradients + s * rows.row;
        if (k.operation >= MEAN) {
            for_groups(k, [&](int64_t a, int64_t out, int64_t count) {
                backward_of_group(k, values, d, a, out, count, d + a);
            });
            continue;
        }
        const Operands from(k, rows, s);
        Floats sum_a{}, sum_b{};  // of an operand that is one unit
        for_lanes(k.width, [&](int64_t i, int64_t here) {
            const Floats given = load(d + k.out + i, here);
            Floats by_a, by_b;
            derivatives(k, from.first(i, here), from.second(i, here), load(values + k.out + i, here), by_a, by_b);
            const Floats to_a = given * by_a, to_b = given * by_b;
            const auto give_to = [&](float* to, int64_t step, int64_t how, Floats v, Floats& sum) {
                if (!how) return;
                if (step)
                    store(to + i, how == ADDS ? load(to + i, here) + v : v, here);
                else
                    for (int64_t lane = 0; lane < here; lane++) sum[lane] += v[lane];
            };
            give_to(d + k.a, k.a_step, k.a_gradient, to_a, sum_a);
            give_to(d + k.b, k.b_step, k.b_kind == UNITS ? k.b_gradient : 0, to_b, sum_b);
            if (of_vector) store(of_vector + i, s > 0 || adds ? load(of_vector + i, here) + to_b : to_b, here);
        });
        if (!k.a_step && k.a_gradient) d[k.a] = (k.a_gradient == ADDS ? d[k.a] : 0.0f) + sum_of(sum_a);
        if (!k.b_step && k.b_gradient && k.b_kind == UNITS)
            d[k.b] = (k.b_gradient == ADDS ? d[k.b] : 0.0f) + sum_of(sum_b);
    }
}

}  // namespace fastsde
