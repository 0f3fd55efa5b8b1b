// The activations of networks, and their derivatives.

#pragma once

#include <vector>

#include "codes.h"
#include "simd.h"

namespace fastsde {

// All activations that the kernels know, by their names in fastsde/models/activations.py.
#define FASTSDE_ACTIVATIONS(X)   \
    X(IDENTITY, "Identity")      \
    X(LOG_SIGMOID, "LogSigmoid") \
    X(SILU, "SiLU")              \
    X(RELU, "ReLU")              \
    X(LEAKY_RELU, "LeakyReLU")   \
    X(ELU, "ELU")                \
    X(TANH, "Tanh")              \
    X(SIGMOID, "Sigmoid")        \
    X(GELU, "GELU")              \
    X(GELU_TANH, "GELU_tanh")    \
    X(SOFTPLUS, "Softplus")      \
    X(MISH, "Mish")              \
    X(SIN, "Sin")
FASTSDE_ENUM(Activation, FASTSDE_ACTIVATIONS)

static inline std::vector<Activation> known_activations(const int32_t* codes, int64_t count) {
    std::vector<Activation> found;
    for (int64_t i = 0; i < count; i++) found.push_back(known<Activation>(codes[i]));
    return found;
}

// e^(-scale |x|); NaN stays NaN.
static inline Floats falling(Floats x, float scale) {
    return exp2_negative(minus_absolute(x) * (scale * 1.44269504f));
}

static inline Floats sigmoid(Floats x) {
    const Floats e = falling(x, 1.0f);
    return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

static inline Floats tanh(Floats x) {
    const Floats e = falling(x, 2.0f);
    return odd((1.0f - e) / (1.0f + e), x);
}

// PyTorch's default of the parameter: LeakyReLU's slope and ELU's alpha.
static inline float usual_parameter(Activation kind) { return kind == LEAKY_RELU ? 0.01f : 1.0f; }

// The compiler removes the value or the derivative if it is not used.
template <Activation KIND>
static inline void activate(Floats x, float parameter, Floats& value, Floats& derivative) {
    const Floats one = all(1.0f);
    if constexpr (KIND == IDENTITY) {
        value = x, derivative = one;
    } else if constexpr (KIND == LOG_SIGMOID || KIND == SOFTPLUS) {
        const bool rises = KIND == SOFTPLUS;
        const Floats e = falling(x, 1.0f);
        const Floats tail = log1p(e);
        value = rises ? at_least(x, 0.0f) + tail : at_most(x, 0.0f) - tail;
        derivative = ((rises ? x < 0.0f : x > 0.0f) ? e : one) / (one + e);
    } else if constexpr (KIND == SILU) {
        const Floats s = sigmoid(x);
        value = x * s, derivative = s * (one + x * (one - s));
    } else if constexpr (KIND == RELU) {
        value = at_least(x, 0.0f), derivative = x > 0.0f ? one : Floats{};
    } else if constexpr (KIND == LEAKY_RELU) {
        value = x > 0.0f ? x : parameter * x, derivative = x > 0.0f ? one : all(parameter);
    } else if constexpr (KIND == ELU) {
        const Floats e = parameter * exp2_negative(at_most(x, 0.0f) * 1.44269504f);
        value = x > 0.0f ? x : e - parameter, derivative = x > 0.0f ? one : e;
    } else if constexpr (KIND == TANH) {
        value = tanh(x), derivative = one - value * value;
    } else if constexpr (KIND == SIGMOID) {
        value = sigmoid(x), derivative = value * (one - value);
    } else if constexpr (KIND == MISH) {
        // tanh ln(1 + e^x) is n / (n + 2) with n = e^x (e^x + 2), or the same divided by e^2x.
        const Floats e = falling(x, 1.0f);
        const Floats n = x < 0.0f ? e * (e + 2.0f) : one + 2.0f * e;
        const Floats below = n / (n + (x < 0.0f ? all(2.0f) : 2.0f * e * e));
        value = x * below, derivative = below + x * (one - below * below) * sigmoid(x);
    } else if constexpr (KIND == SIN) {
        sin_cos(x, value, derivative);
    } else if constexpr (KIND == GELU) {
        const Floats size = at_most(absolute(x), TAIL_END), tail = normal_tail(size);
        const Floats below = x < 0.0f ? tail : 1.0f - tail;
        value = at_least(x, 0.0f) - size * tail;
        derivative = below + x * (0.398942280f * exp2_negative(x * x * -0.721347520f));
    } else {
        static_assert(KIND == GELU_TANH, "an activation without a formula");
        const float slope = 0.797884561f, cubic = 0.044715f;
        const Floats t = tanh(slope * x * (one + cubic * x * x));
        value = 0.5f * x * (one + t);
        derivative = 0.5f * (one + t) + 0.5f * x * (one - t * t) * slope * (one + 3.0f * cubic * x * x);
    }
}

template <Activation KIND>
static inline void activate_all(float* x, float* derivative, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        Floats value, slope;
        activate<KIND>(load(x + i), usual_parameter(KIND), value, slope);
        store(x + i, value);
        if (derivative) store(derivative + i, slope);
    }
}

// Activates ``count`` values, a multiple of LANES, in place, and writes the derivatives unless the pointer is null.
static inline void activate(Activation kind, float* x, float* derivative, int64_t count) {
    switch (kind) {
#define FASTSDE_CASE(member, name) \
    case member: return activate_all<member>(x, derivative, count);
        FASTSDE_ACTIVATIONS(FASTSDE_CASE)
#undef FASTSDE_CASE
    }
}

}  // namespace fastsde
