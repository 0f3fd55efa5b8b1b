// Posterior noising x_t = alpha(t) x_0 + sigma(t) z (the twin of fastsde.reference.perturb).

#include "training.h"

using namespace fastsde;

// x_t [n, size] and t_out [n], fp32. Nullable: index, t and z; keys where both of these are given.
extern "C" void fastsde_perturb(const void* x_0, int bytes, const int64_t* index, int64_t rows, const int64_t* keys,
                                const float* t, const float* z, int64_t step, float scale, float shift, float t_min,
                                float beta_min, float beta_max, int64_t n, int64_t size, float* x_t, float* t_out,
                                int threads) {
    const Data data{x_0, bytes != 0, index, rows, size, scale, shift};
    const Schedule sde{beta_min, beta_max};
    for_parts(Parts(n, size), threads, [&](int64_t, const Part& part) {
        const int64_t start = part.start(size);
        float x[PART], drawn[PART];
        data.read(part, x);
        const float* noise = z ? z + start : drawn;
        if (!z) draw_normals(keys, draw_offset(step, TRAINING_NOISE), part, n, drawn);
        for_lanes(part.samples, [&](int64_t first, int64_t here) {
            Floats time;
            if (t) {
                time = load(t + part.first_sample + first, here);
            } else {
                const Keys lanes = Keys::load(keys, part.first_sample + first, n);
                time = t_min + (1.0f - t_min) * uniforms_across(lanes, draw_offset(step, TRAINING_TIME));
            }
            if (part.first_element == 0) store(t_out + part.first_sample + first, time, here);
            const Floats alpha = sde.alpha(time), sigma = sde.sigma(time);
            for (int64_t i = 0; i < here; i++) {
                const int64_t at = (first + i) * part.elements;
                for (int64_t e = 0; e < part.elements; e++)
                    x_t[start + at + e] = alpha[i] * x[at + e] + sigma[i] * noise[at + e];
            }
        });
    });
}
