// The sizes of the steps of a Langevin row (the twin of fastsde.reference.langevin_size), for each sample:
//
//     eps = min(2 (snr |z| / |g|)^2, eps_max),   g = D = p.s + q f with guidance (solver_step.cpp),   or 0 where g is 0
//
// A sample is summed in pieces, in an order that depends only on its size.

#include "parts.h"
#include "table.h"

using namespace fastsde;

// Writes eps and sqrt(2 eps) to ``sizes`` [n, 2]. ``slots`` has m pointers to [n, size], null where p is 0. Nullable:
// f_uncond and with it scale [n], rates [K] and factor [n] (1 if null), z, keys if z is given.
extern "C" void fastsde_langevin_size(const float* const* slots, const float* f, const float* f_uncond, const float* z,
                                      const int64_t* keys, const float* table, const float* scale, const float* rates,
                                      const float* factor, int64_t m, int64_t row, float snr, float largest,
                                      int64_t n, int64_t size, float* sizes, int threads) {
    const Row<> k{table + row * row_width(m), (int)m};
    const Parts parts(n, size);
    const int64_t groups = parts.count() / parts.parts_each;  // of samples
    const float rate = rates ? rates[row] : 1.0f, infinite = std::numeric_limits<float>::infinity();
    const uint64_t draw = draw_offset(row + 1, SAMPLING);
    run_team(groups > 1 ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t group = 0; group < groups; group++) {
            double of_g[PART] = {}, of_z[PART] = {};
            float drawn[PART];
            for (int64_t piece = 0; piece < parts.parts_each; piece++) {
                const Part part = parts[group * parts.parts_each + piece];
                const int64_t start = part.start(size);
                if (!z) draw_normals(keys, draw, part, n, drawn);
                for (int64_t i = 0; i < part.samples; i++) {
                    const int64_t sample = part.first_sample + i, at = start + i * part.elements;
                    const float* noise = z ? z + at : drawn + i * part.elements;
                    const float w = f_uncond ? rate * scale[sample] : 0.0f, c = factor ? factor[sample] : 1.0f;
                    Floats g_sum{}, z_sum{};
                    for_lanes(part.elements, [&](int64_t first, int64_t here) {
                        Floats s[MAX_SLOTS], of_f = load(f + at + first, here);
                        for (int j = 0; j < m; j++) s[j] = slots[j] ? load(slots[j] + at + first, here) : Floats{};
                        if (f_uncond) {
                            const Floats uncond = load(f_uncond + at + first, here);
                            of_f = c * (uncond + w * (of_f - uncond));
                        }
                        const Floats g = k.data(s, of_f, infinite), of_noise = load(noise + first, here);
                        g_sum += g * g;
                        z_sum += of_noise * of_noise;
                    });
                    of_g[i] += sum_of(g_sum);
                    of_z[i] += sum_of(z_sum);
                }
            }
            const Part part = parts[group * parts.parts_each];
            for (int64_t i = 0; i < part.samples; i++) {
                const double full = of_g[i] == 0 ? 0.0 : 2.0 * snr * snr * of_z[i] / of_g[i];
                const double eps = full > largest ? largest : full;
                float* to = sizes + 2 * (part.first_sample + i);
                to[0] = (float)eps, to[1] = (float)std::sqrt(2.0 * eps);
            }
        }
    });
}
