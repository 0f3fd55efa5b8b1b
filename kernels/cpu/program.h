// The program of a lowered network (fastsde/lowering/program.py) for a block of samples.
//
// A value is [units, samples], and lives at its offset, in units, in the memory of the block. An instruction computes
// rows of such values: a linear layer, or elementwise work on one or two operands. An operand is a run of units, or one
// unit for all rows (step 0), or a number per row of the value: a constant, or one that follows the row of the table.

#pragma once

#include "activations.h"
#include "codes.h"
#include "gemm.h"

namespace fastsde {

// What instructions do, by their names in fastsde/lowering/program.py. "activation" is any of FASTSDE_ACTIVATIONS.
#define FASTSDE_OPERATIONS(X)       \
    X(LINEAR, "linear")             \
    X(ACTIVATION, "activation")     \
    X(ADD, "add")                   \
    X(SUBTRACT, "subtract")         \
    X(MULTIPLY, "multiply")         \
    X(DIVIDE, "divide")             \
    X(AFFINE, "affine")             \
    X(CLAMP, "clamp")               \
    X(EXP, "exp")                   \
    X(SQRT, "sqrt")                 \
    X(RSQRT, "rsqrt")               \
    X(RECIPROCAL, "reciprocal")     \
    X(ABS, "abs")                   \
    X(COS, "cos")                   \
    X(ERF, "erf")                   \
    X(FILL, "fill")                 \
    X(MEAN, "mean")                 \
    X(LAYER_NORM, "layer_norm")     \
    X(RMS_NORM, "rms_norm")
FASTSDE_ENUM(Operation, FASTSDE_OPERATIONS)

// What the second operand of an instruction is.
enum Operand : int64_t { NO_OPERAND = 0, UNITS = 1, CONSTANT = 2, OF_ROW = 3 };

// An instruction as the caller writes it: a field of _Instruction in mlp_sampler.py each.
struct Instruction {
    int64_t operation, activation;
    int64_t out, a, a_step, width;       // the first units of result and operand, and the units of the result
    int64_t b_kind, b, b_step;           // UNITS: a unit; OF_ROW: an offset in the vectors of the row
    const float* constant;               // CONSTANT: [width]
    int64_t depth;                       // of a linear layer: its inputs; of norms and means: the units of a group
    const float* weights;                // [width, depth]
    int64_t w_row, w_column;             // strides of the weights
    int64_t starts_stage, feeds_linear;  // whether it waits for all rows of earlier ones; whether a product reads it
    float parameters[2];
};

// The memory of a block: units [0, dim) are the network's input, the others are in ``memory``.
struct Units {
    const float* input;
    float* memory;
    int64_t dim, samples;  // samples: a multiple of LANES

    const float* at(int64_t unit) const {
        return unit < dim ? input + unit * samples : memory + (unit - dim) * samples;
    }
    float* to(int64_t unit) const { return memory + (unit - dim) * samples; }
};

// Runs body(a, b) for the elements of some rows and stores its results.
template <class Second, class Body>
static inline void for_elements(const Instruction& k, const Units& units, int64_t first, int64_t end, Second second,
                                Body body) {
    const int64_t samples = units.samples;
    for (int64_t row = first; row < end; row++) {
        const float* a = units.at(k.a + row * k.a_step);
        float* out = units.to(k.out + row);
        auto b = second(row);
        for (int64_t i = 0; i < samples; i += LANES) store(out + i, body(load(a + i), b(i)));
    }
}

template <class Body>
static inline void map(const Instruction& k, const Units& units, int64_t first, int64_t end, Body body) {
    if (k.a_step == 1) {  // one run of memory
        const float* a = units.at(k.a + first);
        float* out = units.to(k.out + first);
        const int64_t count = (end - first) * units.samples;
        for (int64_t i = 0; i < count; i += LANES) store(out + i, body(load(a + i)));
        return;
    }
    const auto nothing = [](int64_t) { return [](int64_t) { return Floats{}; }; };
    for_elements(k, units, first, end, nothing, [&](Floats a, Floats) { return body(a); });
}

template <class Body>
static inline void combine(const Instruction& k, const Units& units, const float* of_row, int64_t first, int64_t end,
                           Body body) {
    if (k.b_kind == UNITS && k.a_step == 1 && k.b_step == 1) {  // three runs of memory
        const float *a = units.at(k.a + first), *b = units.at(k.b + first);
        float* out = units.to(k.out + first);
        const int64_t count = (end - first) * units.samples;
        for (int64_t i = 0; i < count; i += LANES) store(out + i, body(load(a + i), load(b + i)));
        return;
    }
    if (k.b_kind == UNITS) {
        const auto second = [&](int64_t row) {
            const float* b = units.at(k.b + row * k.b_step);
            return [b](int64_t i) { return load(b + i); };
        };
        return for_elements(k, units, first, end, second, body);
    }
    const float* vector = k.b_kind == CONSTANT ? k.constant : of_row + k.b;
    const auto second = [&](int64_t row) {
        const Floats b = all(vector[row]);
        return [b](int64_t) { return b; };
    };
    for_elements(k, units, first, end, second, body);
}

template <Activation KIND>
static inline void activate(const Instruction& k, const Units& units, int64_t first, int64_t end) {
    const float parameter = k.parameters[0];
    map(k, units, first, end, [&](Floats a) {
        Floats value, slope;
        activate<KIND>(a, parameter, value, slope);
        return value;
    });
}

// Whether an instruction is the cosine of what the one before it is the sine of: embeddings have both.
static inline bool is_cosine_of(const Instruction& k, const Instruction& before) {
    return k.operation == COS && before.operation == ACTIVATION && before.activation == SIN && k.a == before.a &&
           k.a_step == before.a_step && k.width == before.width;
}

// Computes rows of a sine and its cosine.
static inline void run_sine_and_cosine(const Instruction& sine, const Instruction& cosine, const Units& units,
                                       int64_t first, int64_t end) {
    const bool is_one_run = sine.a_step == 1;
    const int64_t runs = is_one_run ? 1 : end - first, count = is_one_run ? (end - first) * units.samples : units.samples;
    for (int64_t row = first; row < first + runs; row++) {
        const float* a = units.at(sine.a + row * sine.a_step);
        float *to_sine = units.to(sine.out + row), *to_cosine = units.to(cosine.out + row);
        for (int64_t i = 0; i < count; i += LANES) {
            Floats s, c;
            sin_cos(load(a + i), s, c);
            store(to_sine + i, s), store(to_cosine + i, c);
        }
    }
}

// Computes rows ``first`` to ``end - 1`` of an elementwise instruction.
static inline void run_elements(const Instruction& k, const Units& units, const float* of_row, int64_t first,
                                int64_t end) {
    const float p = k.parameters[0], q = k.parameters[1];
    switch ((Operation)k.operation) {
        case ACTIVATION:
            switch ((Activation)k.activation) {
#define FASTSDE_CASE(member, name) \
    case member: return activate<member>(k, units, first, end);
                FASTSDE_ACTIVATIONS(FASTSDE_CASE)
#undef FASTSDE_CASE
            }
            return;
        case ADD: return combine(k, units, of_row, first, end, [](Floats a, Floats b) { return a + b; });
        case SUBTRACT: return combine(k, units, of_row, first, end, [](Floats a, Floats b) { return a - b; });
        case MULTIPLY: return combine(k, units, of_row, first, end, [](Floats a, Floats b) { return a * b; });
        case DIVIDE: return combine(k, units, of_row, first, end, [](Floats a, Floats b) { return a / b; });
        case FILL: return combine(k, units, of_row, first, end, [](Floats, Floats b) { return b; });
        case AFFINE: return map(k, units, first, end, [=](Floats a) { return a * p + q; });
        case CLAMP: return map(k, units, first, end, [=](Floats a) { return at_least(at_most(a, q), p); });
        case EXP: return map(k, units, first, end, [](Floats a) { return exp(a); });
        case SQRT: return map(k, units, first, end, [](Floats a) { return square_root(a); });
        case RSQRT: return map(k, units, first, end, [](Floats a) { return 1.0f / square_root(a); });
        case RECIPROCAL: return map(k, units, first, end, [](Floats a) { return 1.0f / a; });
        case ABS: return map(k, units, first, end, [](Floats a) { return absolute(a); });
        case COS:
            return map(k, units, first, end, [](Floats a) {
                Floats sine, cosine;
                sin_cos(a, sine, cosine);
                return cosine;
            });
        case ERF: return map(k, units, first, end, [](Floats a) { return erf(a); });
        case LINEAR: case MEAN: case LAYER_NORM: case RMS_NORM: return;
    }
}

// Computes groups ``first`` to ``end - 1`` of a mean or a norm over groups of ``depth`` units.
static inline void run_groups(const Instruction& k, const Units& units, int64_t first, int64_t end) {
    const float share = 1.0f / (float)k.depth;
    for (int64_t group = first; group < end; group++) {
        const float* a = units.at(k.a + group * k.depth);
        for (int64_t i = 0; i < units.samples; i += LANES) {
            Floats sum{}, squares{};
            if (k.operation != RMS_NORM)
                for (int64_t unit = 0; unit < k.depth; unit++) sum += load(a + unit * units.samples + i);
            const Floats mean = sum * share;
            if (k.operation == MEAN) {
                store(units.to(k.out + group) + i, mean);
                continue;
            }
            for (int64_t unit = 0; unit < k.depth; unit++) {
                const Floats off = load(a + unit * units.samples + i) - mean;
                squares += off * off;
            }
            const Floats factor = 1.0f / square_root(squares * share + k.parameters[0]);
            float* out = units.to(k.out + group * k.depth);
            for (int64_t unit = 0; unit < k.depth; unit++)
                store(out + unit * units.samples + i, (load(a + unit * units.samples + i) - mean) * factor);
        }
    }
}

}  // namespace fastsde
