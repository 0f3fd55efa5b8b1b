// Draws of the noise contract (the twins of fastsde.noise.normal, bits and uniform).

#include "parts.h"

using namespace fastsde;

// Writes the normals [n, size] of one step of a stream to ``out``.
extern "C" void fastsde_normal(const int64_t* keys, int64_t step, int64_t stream, int64_t n, int64_t size, float* out,
                               int threads) {
    const Parts parts(n, size);
    const uint64_t draw = draw_offset(step, (Stream)stream);
    for_parts(parts, threads, [&](int64_t, const Part& part) {
        draw_normals(keys, draw, part, n, out + part.start(size));
    });
}

// Writes the 32-bit words [n, size] of one step of a stream to ``out``.
extern "C" void fastsde_bits(const int64_t* keys, int64_t step, int64_t stream, int64_t n, int64_t size, uint32_t* out,
                             int threads) {
    const uint64_t draw = draw_offset(step, (Stream)stream);
    run_team(n > LANES ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n; first += LANES) {
            const Keys lanes = Keys::load(keys, first, n);
            for (int64_t element = 0; element < size; element += 4) {
                Words words[4];
                words_across(lanes, draw + (uint64_t)element / 4, words);
                for (int64_t i = 0; i < std::min<int64_t>(LANES, n - first); i++)
                    for (int64_t j = 0; j < std::min<int64_t>(4, size - element); j++)
                        out[(first + i) * size + element + j] = words[j][i];
            }
        }
    });
}

// Writes the uniforms [steps, n] of element 0, for each key in each of ``steps`` steps from ``first_step``, to ``out``.
extern "C" void fastsde_uniform(const int64_t* keys, int64_t first_step, int64_t stream, int64_t steps, int64_t n,
                                float* out, int threads) {
    run_team(steps * n > 64 * LANES ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n; first += LANES) {
            const Keys lanes = Keys::load(keys, first, n);
            const int64_t here = std::min<int64_t>(LANES, n - first);
            for (int64_t i = 0; i < steps; i++)
                store(out + i * n + first, uniforms_across(lanes, draw_offset(first_step + i, (Stream)stream)), here);
        }
    });
}
