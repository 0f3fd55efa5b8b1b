// The coefficients of an objective, interpolated (the twin of fastsde.interpolation.Interpolation.at).

#include <atomic>

#include "objective.h"

using namespace fastsde;

// Writes the coefficients at ``times`` [n] to ``table`` [n, 6]; returns how many times lie outside of the segments,
// whose coefficients are meaningless.
extern "C" int64_t fastsde_coefficients(const float* times, int64_t n, const float* rows, int64_t segments,
                                        int64_t first, int64_t shift, float* table, int threads) {
    const Interpolation interpolation{rows, segments, (int32_t)first, (int32_t)shift};
    std::atomic<int64_t> outside{0};
    run_team(n > PART ? threads : 1, [&] {
        int64_t mine = 0;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n; i += LANES) {
            const int64_t here = std::min<int64_t>(LANES, n - i);
            mine += interpolation.at(load(times + i, here), here, (Coefficients*)table + i);
        }
        outside += mine;
    });
    return outside;
}

// Writes the coefficients [steps, n, 6] at the times of ``steps`` steps, low + span u with the uniforms u of the keys,
// rounded twice as in PyTorch; returns how many times lie outside.
extern "C" int64_t fastsde_step_coefficients(const int64_t* keys, int64_t step, int64_t steps, float low, float span,
                                             int64_t n, const float* rows, int64_t segments, int64_t first,
                                             int64_t shift, float* table, int threads) {
    const Interpolation interpolation{rows, segments, (int32_t)first, (int32_t)shift};
    std::atomic<int64_t> outside{0};
    run_team(steps * n > PART ? threads : 1, [&] {
        int64_t mine = 0;
#pragma omp for schedule(static) nowait
        for (int64_t sample = 0; sample < n; sample += LANES) {
            const Keys lanes = Keys::load(keys, sample, n);
            const int64_t here = std::min<int64_t>(LANES, n - sample);
            for (int64_t k = 0; k < steps; k++) {
                const Floats u = uniforms_across(lanes, draw_offset(step + k, TRAINING_TIME));
                mine += interpolation.at(low + rounded(span * u), here, (Coefficients*)table + k * n + sample);
            }
        }
        outside += mine;
    });
    return outside;
}
