// The loss of an objective, forward and backward (the twin of fastsde.reference.dsm_loss):
//
//     loss = mean of (w_f f + w_x x_0 + w_z z)^2,   d loss / d f = 2 w_f (w_f f + w_x x_0 + w_z z) / n
//
// Each part has its own sum, and these are added in order.

#include <vector>

#include "codes.h"
#include "objective.h"

using namespace fastsde;

// Writes the loss to ``loss`` [1] and its gradient by f, times ``grad`` [1] if given, to ``gradient`` [n, size].
// Nullable: index, z, keys if z is given, grad, loss and gradient.
extern "C" int fastsde_dsm_loss(const float* f, const void* x_0, int bytes, const int64_t* index, int64_t rows,
                                const float* table, const int64_t* keys, const float* z, int64_t step, float scale,
                                float shift, int64_t n, int64_t size, const float* grad, float* loss, float* gradient,
                                int threads) {
    const Data data{x_0, bytes != 0, index, rows, size, scale, shift};
    const Coefficients* coefficients = (const Coefficients*)table;
    const Parts parts(n, size);
    const double mean = 1.0 / ((double)n * (double)size);
    const float outer = (float)(2.0 * mean * (grad ? (double)*grad : 1.0));
    return with_status([&] {
        std::vector<double> sums(parts.count());
        for_parts(parts, threads, [&](int64_t index_of_part, const Part& part) {
            const int64_t start = part.start(size), count = part.elements;
            float buffer[PART], drawn[PART];
            const Coefficients* here = coefficients + part.first_sample;
            const auto needs_noise = [](const Coefficients& k) { return k.w_z != 0; };
            if (!z && std::any_of(here, here + part.samples, needs_noise))
                draw_normals(keys, draw_offset(step, TRAINING_NOISE), part, n, drawn);
            const float* noise = z ? z + start : drawn;
            double sum = 0;
            for (int64_t i = 0; i < part.samples; i++) {
                const int64_t sample = part.first_sample + i, at = start + i * count;
                const Coefficients k = here[i];
                const float* x = k.w_x != 0 ? data.of_sample(sample, part.first_element, count, buffer) : NOTHING;
                const float* of_noise = k.w_z != 0 ? noise + i * count : NOTHING;
                const float* of_f = k.w_f != 0 ? f + at : NOTHING;
                sum += gradient ? squared_residuals<true>(k, of_f, x, of_noise, count, outer * k.w_f, gradient + at)
                                : squared_residuals<false>(k, of_f, x, of_noise, count, 0.0f, nullptr);
            }
            sums[index_of_part] = sum;
        });
        if (!loss) return;
        double sum = 0;
        for (const double of_part : sums) sum += of_part;
        *loss = (float)(sum * mean);
    });
}
