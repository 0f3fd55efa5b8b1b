// Noising x_in = u_x x_0 + u_z z (the twin of fastsde.reference.perturb).

#include "objective.h"

using namespace fastsde;

// Writes x_in [n, size], tau [n], and drawn noise [n, size] to ``kept``. Nullable: index, z, kept; keys if z is given.
extern "C" void fastsde_perturb(const void* x_0, int bytes, const int64_t* index, int64_t rows, const int64_t* keys,
                                const float* table, const float* z, int64_t step, float scale, float shift, int64_t n,
                                int64_t size, float* x_in, float* tau, float* kept, int threads) {
    const Data data{x_0, bytes != 0, index, rows, size, scale, shift};
    const Coefficients* coefficients = (const Coefficients*)table;
    for_parts(Parts(n, size), threads, [&](int64_t, const Part& part) {
        const int64_t start = part.start(size), count = part.elements;
        float buffer[PART], drawn[PART];
        const float* noise = z ? z + start : kept ? kept + start : drawn;
        if (!z) draw_normals(keys, draw_offset(step, TRAINING_NOISE), part, n, kept ? kept + start : drawn);
        for (int64_t i = 0; i < part.samples; i++) {
            const int64_t sample = part.first_sample + i;
            const Coefficients k = coefficients[sample];
            if (part.first_element == 0) tau[sample] = k.tau;
            const float* x = k.u_x != 0 ? data.of_sample(sample, part.first_element, count, buffer) : NOTHING;
            const float* of_noise = k.u_z != 0 ? noise + i * count : NOTHING;
            noise_sample(k, x, of_noise, count, x_in + start + i * count);
        }
    });
}
