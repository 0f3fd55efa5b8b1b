// Shared by noising, the loss and training: the coefficients of an objective, and the data of a training step.

#pragma once

#include "parts.h"

namespace fastsde {

// The coefficients of one sample, a row of fastsde.objective.Objective.table.
struct Coefficients {
    float tau, u_x, u_z, w_f, w_x, w_z;
};
constexpr int64_t COLUMNS_OF_TABLE = sizeof(Coefficients) / sizeof(float);

// Coefficients as piecewise cubics of the time (fastsde.interpolation): a segment is a run of 2^shift fp32 numbers,
// starting at the number with the bits ``first`` (the last segment includes the number behind it, too), and its row
// holds the coefficients of the powers of t - middle, each padded to WIDTH numbers.
struct Interpolation {
    static constexpr int64_t POWERS = 4, WIDTH = 8;
    typedef float Row __attribute__((vector_size(4 * WIDTH)));

    const float* rows;
    int64_t segments;
    int32_t first, shift;

    // Writes the coefficients at LANES times, of which the first ``here`` exist; returns how many lie outside of all
    // segments, or are NaN: their coefficients are meaningless.
    int64_t at(Floats t, int64_t here, Coefficients* to) const {
        const Words place = bits_of<Words>(t) - (uint32_t)first;  // beyond the last for negative times, too
        const Words beyond = place > (uint32_t)segments << shift, last = (uint32_t)(segments - 1) - Words{};
        const Words found = place >> shift, segment = found < last ? found : last;
        const Floats x = t - bits_of<Floats>((segment << shift) + (uint32_t)(first + (1 << (shift - 1))));
        int64_t outside = 0;
        for (int64_t i = 0; i < here; i++) {
            Row row[POWERS];
            std::memcpy(row, rows + segment[i] * POWERS * WIDTH, sizeof(row));
            const Row sum = row[0] + x[i] * (row[1] + x[i] * (row[2] + x[i] * row[3]));
            std::memcpy(to + i, &sum, i + 1 < here ? sizeof(sum) : sizeof(Coefficients));  // the next covers the rest
            outside -= (int32_t)beyond[i];
        }
        return outside;
    }
};

// scale x + shift for the rows ``index`` of the data [rows, size], uint8 or fp32. A row that does not exist is NaN.
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

    // Returns part of a sample, in place or copied to the buffer.
    const float* of_sample(int64_t sample, int64_t first_element, int64_t count, float* buffer) const {
        const int64_t row = index ? index[sample] : sample;
        if (!bytes && scale == 1.0f && shift == 0.0f && row >= 0 && row < rows)
            return (const float*)x + row * size + first_element;
        read_row(row, first_element, count, buffer);
        return buffer;
    }
};

// Stands in for the operand of a zero coefficient, which is not read.
alignas(64) static const float NOTHING[PART] = {};

// Keeps a loop over few elements, such as the tails below, from being vectorized: the set-up would take longer.
static inline void stay_scalar() { asm volatile(""); }

// Computes x_in of one sample.
static inline void noise_sample(const Coefficients& k, const float* x, const float* z, int64_t count, float* x_in) {
    int64_t e = 0;
    for (; e + LANES <= count; e += LANES) store(x_in + e, k.u_x * load(x + e) + k.u_z * load(z + e));
    for (; e < count; e++) {
        stay_scalar();
        x_in[e] = k.u_x * x[e] + k.u_z * z[e];
    }
}

// Returns the sum of one sample's squared residuals; if GRADIENT, writes outer times each residual to ``gradient``.
template <bool GRADIENT>
static inline double squared_residuals(const Coefficients& k, const float* f, const float* x, const float* z,
                                       int64_t count, float outer, float* gradient) {
    Floats sums[2] = {};
    int64_t e = 0;
    for (; e + LANES <= count; e += LANES) {
        const Floats residual = k.w_f * load(f + e) + (k.w_x * load(x + e) + k.w_z * load(z + e));
        if (GRADIENT) store(gradient + e, outer * residual);
        sums[e / LANES % 2] += residual * residual;
    }
    float sum = count >= LANES ? sum_of(sums[0] + sums[1]) : 0.0f;
    for (; e < count; e++) {
        stay_scalar();
        const float residual = k.w_f * f[e] + (k.w_x * x[e] + k.w_z * z[e]);
        if (GRADIENT) gradient[e] = outer * residual;
        sum += residual * residual;
    }
    return sum;
}

}  // namespace fastsde
