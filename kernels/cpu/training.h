// What perturb and dsm_loss share: the schedule of the VP-SDE, and the data and noise of a training step.

#pragma once

#include "codes.h"
#include "parts.h"

namespace fastsde {

struct Schedule {
    float beta_min, beta_max;

    Floats beta(Floats t) const { return beta_min + (beta_max - beta_min) * t; }
    Floats integral(Floats t) const { return (beta_min + 0.5f * (beta_max - beta_min) * t) * t; }
    Floats alpha(Floats t) const { return exp(-0.5f * integral(t)); }
    Floats sigma(Floats t) const { return square_root(one_minus_exp(integral(t))); }
};

// scale x + shift of the rows ``index`` of the data [rows, size], uint8 or fp32. A row that is not there is NaN.
struct Data {
    const void* x;
    bool bytes;
    const int64_t* index;
    int64_t rows, size;
    float scale, shift;

    void read_row(int64_t row, int64_t first_element, int64_t count, float* to) const {
        if (row < 0 || row >= rows) return std::fill(to, to + count, std::numeric_limits<float>::quiet_NaN());
        const int64_t start = row * size + first_element;
        if (bytes)
            for (int64_t i = 0; i < count; i++) to[i] = scale * (float)((const uint8_t*)x)[start + i] + shift;
        else
            for (int64_t i = 0; i < count; i++) to[i] = scale * ((const float*)x)[start + i] + shift;
    }

    void read(const Part& part, float* to) const {
        for (int64_t i = 0; i < part.samples; i++) {
            const int64_t sample = part.first_sample + i;
            read_row(index ? index[sample] : sample, part.first_element, part.elements, to + i * part.elements);
        }
    }
};

// Those that are known, by the names of fastsde/solvers.py and fastsde/reference.py.
#define FASTSDE_PREDICTIONS(X) X(SCORE, "score") X(EPS, "eps") X(X0, "x0") X(V, "v")
#define FASTSDE_WEIGHTINGS(X) X(SIGMA2, "sigma2") X(LIKELIHOOD, "likelihood") X(TARGET, "target")
FASTSDE_ENUM(Prediction, FASTSDE_PREDICTIONS)
FASTSDE_ENUM(Weighting, FASTSDE_WEIGHTINGS)

// The residual of the loss of one sample.
struct Residual {
    float from_z, from_x, factor;

    // factor (f - (from_z z + from_x x_0)). What has no part in it is not read.
    float operator()(float f, const float* z, const float* x_0) const {
        return factor * (f - ((from_z != 0 ? from_z * *z : 0.0f) + (from_x != 0 ? from_x * *x_0 : 0.0f)));
    }
};

// That of LANES samples, by their times.
struct Target {
    Floats from_z, from_x, factor;

    Residual operator[](int64_t i) const { return Residual{from_z[i], from_x[i], factor[i]}; }

    Target(const Schedule& sde, Prediction prediction, Weighting weighting, Floats t) {
        const Floats alpha = sde.alpha(t), sigma = sde.sigma(t), one = all(1.0f), none{};
        switch (prediction) {
            case SCORE: from_z = -one / sigma, from_x = none, factor = sigma; break;
            case EPS: from_z = one, from_x = none, factor = one; break;
            case X0: from_z = none, from_x = one, factor = alpha / sigma; break;
            case V: from_z = alpha, from_x = -sigma, factor = alpha; break;
            default: __builtin_trap();
        }
        switch (weighting) {
            case SIGMA2: break;
            case LIKELIHOOD: factor *= square_root(sde.beta(t)) / sigma; break;
            case TARGET: factor = one; break;
            default: __builtin_trap();
        }
    }
};

}  // namespace fastsde
