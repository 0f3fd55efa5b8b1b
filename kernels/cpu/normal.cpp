// Normals of the noise contract (the twin of fastsde.noise.normal).

#include "parts.h"

using namespace fastsde;

// One step's draw of a stream: [n, size] to ``out``.
extern "C" void fastsde_normal(const int64_t* keys, int64_t step, int64_t stream, int64_t n, int64_t size, float* out,
                               int threads) {
    const Parts parts(n, size);
    const uint64_t draw = draw_offset(step, (Stream)stream);
    for_parts(parts, threads, [&](int64_t, const Part& part) {
        draw_normals(keys, draw, part, n, out + part.start(size));
    });
}
