// Denoising score matching, forward and backward (the twin of fastsde.reference.dsm_loss):
//
//     loss = mean of (factor (f - target))^2,   d loss / d f = 2 factor^2 (f - target) / n
//
// Both passes draw z again from the keys. Each part has a sum of its own, and these are added in their order.

#include <vector>

#include "training.h"

using namespace fastsde;

// The loss to ``out`` [1]; or, with the ``grad`` of the loss, the gradient of f [n, size]. Nullable: index, z, keys,
// grad.
extern "C" int fastsde_dsm_loss(const float* f, const void* x_0, int bytes, const int64_t* index, int64_t rows,
                                const float* t, const int64_t* keys, const float* z, int64_t step, float scale,
                                float shift, float beta_min, float beta_max, int prediction_code, int weighting_code,
                                int64_t n, int64_t size, const float* grad, float* out, int threads) {
    const Data data{x_0, bytes != 0, index, rows, size, scale, shift};
    const Schedule sde{beta_min, beta_max};
    const Parts parts(n, size);
    const double mean = 1.0 / ((double)n * (double)size);
    const float outer = grad ? (float)(2.0 * mean * (double)*grad) : 0.0f;
    return with_status([&] {
        const Prediction prediction = known<Prediction>(prediction_code);
        const Weighting weighting = known<Weighting>(weighting_code);
        std::vector<double> sums(parts.count());
        for_parts(parts, threads, [&](int64_t index_of_part, const Part& part) {
            const int64_t start = part.start(size);
            float x[PART], drawn[PART];
            if (prediction == X0 || prediction == V) data.read(part, x);
            const float* noise = z ? z + start : drawn;
            if (!z && prediction != X0) draw_normals(keys, draw_offset(step, TRAINING_NOISE), part, n, drawn);
            double sum = 0;
            for_lanes(part.samples, [&](int64_t first, int64_t here) {
                const Floats time = load(t + part.first_sample + first, here);
                const Target target(sde, prediction, weighting, time);
                for (int64_t i = 0; i < here; i++) {
                    const int64_t at = (first + i) * part.elements;
                    const Residual residual_of = target[i];
                    for (int64_t e = at; e < at + part.elements; e++) {
                        const float residual = residual_of(f[start + e], noise + e, x + e);
                        if (grad)
                            out[start + e] = outer * residual_of.factor * residual;
                        else
                            sum += (double)residual * residual;
                    }
                }
            });
            sums[index_of_part] = sum;
        });
        if (grad) return;
        double sum = 0;
        for (const double of_part : sums) sum += of_part;
        *out = (float)(sum * mean);
    });
}

extern "C" int fastsde_prediction(const char* name, int) { return code_of<Prediction>(name); }

extern "C" int fastsde_weighting(const char* name, int) { return code_of<Weighting>(name); }
