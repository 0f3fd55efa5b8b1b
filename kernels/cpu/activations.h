// The activations of MLPs, and their derivatives.

#pragma once

#include "simd.h"

namespace fastsde {

enum Activation { IDENTITY, LOG_SIGMOID, SILU, RELU, TANH, GELU, GELU_TANH, SOFTPLUS };

// e^(-scale |x|), which is NaN for NaN.
static inline Floats falling(Floats x, float scale) {
    return exp2_negative((x < 0.0f ? x : -x) * (scale * 1.44269504f));
}

static inline Floats sigmoid(Floats x) {
    const Floats e = falling(x, 1.0f);
    return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

static inline Floats tanh(Floats x) {
    const Floats e = falling(x, 2.0f);
    const Floats size = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -size : size;
}

// What is not used of value and derivative, the compiler leaves out.
template <Activation KIND>
static inline void activate(Floats x, Floats& value, Floats& derivative) {
    const Floats one = all(1.0f);
    if (KIND == IDENTITY) {
        value = x, derivative = one;
    } else if (KIND == LOG_SIGMOID || KIND == SOFTPLUS) {
        const bool rises = KIND == SOFTPLUS;
        const Floats e = falling(x, 1.0f);
        const Floats tail = log1p(e);
        value = rises ? at_least(x, 0.0f) + tail : at_most(x, 0.0f) - tail;
        derivative = ((rises ? x < 0.0f : x > 0.0f) ? e : one) / (one + e);
    } else if (KIND == SILU) {
        const Floats s = sigmoid(x);
        value = x * s, derivative = s * (one + x * (one - s));
    } else if (KIND == RELU) {
        value = at_least(x, 0.0f), derivative = x > 0.0f ? one : Floats{};
    } else if (KIND == TANH) {
        value = tanh(x), derivative = one - value * value;
    } else if (KIND == GELU) {
        const Floats below = 0.5f + 0.5f * erf(x * 0.707106781f);
        value = x * below;
        derivative = below + x * (0.398942280f * exp2_negative(x * x * -0.721347520f));
    } else {
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
        activate<KIND>(load(x + i), value, slope);
        store(x + i, value);
        if (derivative) store(derivative + i, slope);
    }
}

// Of ``count`` values, a multiple of LANES, in place; the derivatives go to where they are wanted.
static inline void activate(int32_t kind, float* x, float* derivative, int64_t count) {
    switch (kind) {
        case LOG_SIGMOID: return activate_all<LOG_SIGMOID>(x, derivative, count);
        case SILU: return activate_all<SILU>(x, derivative, count);
        case RELU: return activate_all<RELU>(x, derivative, count);
        case TANH: return activate_all<TANH>(x, derivative, count);
        case GELU: return activate_all<GELU>(x, derivative, count);
        case GELU_TANH: return activate_all<GELU_TANH>(x, derivative, count);
        case SOFTPLUS: return activate_all<SOFTPLUS>(x, derivative, count);
        default: return activate_all<IDENTITY>(x, derivative, count);
    }
}

}  // namespace fastsde
