// One row of a solver's table (table.h), with guidance where there is any: f = f_uncond + w (f - f_uncond).
//
// All tensors are contiguous fp32 [n, size].

#include "parts.h"
#include "table.h"

using namespace fastsde;

namespace {

struct Tensors {
    const float *x, *f, *f_uncond, *history, *z;
    float *out, *data;
};

// ``count`` elements from ``start`` on; ``noise`` is theirs alone. Returns what is not finite: 0 f, 1 x', 2 nothing.
int step(const Tensors& at, int64_t start, int64_t count, const float* noise, const float* k, float guidance,
         float clip) {
    Floats f_sum{}, x_sum{};  // 0, or NaN where a value was not finite
    for_lanes(count, [&](int64_t first, int64_t here) {
        const int64_t i = start + first;
        const Floats x = load(at.x + i, here);
        Floats f = load(at.f + i, here);
        if (at.f_uncond) {
            const Floats uncond = load(at.f_uncond + i, here);
            f_sum += 0.0f * (f + uncond);
            f = uncond + guidance * (f - uncond);
        }
        f_sum += 0.0f * f;
        const Floats history = at.history ? load(at.history + i, here) : Floats{};
        const Floats z = noise ? load(noise + first, here) : Floats{};
        Floats data;
        const Floats next = row_of(k, clip, x, f, history, z, data);
        if (at.data) store(at.data + i, data, here);
        x_sum += 0.0f * next;
        store(at.out + i, next, here);
    });
    return any_nan(f_sum) ? 0 : any_nan(x_sum) ? 1 : 2;
}

}  // namespace

// Nullable: f_uncond, history, z, keys, data. Without z and keys there is no noise. clip is infinite where there is
// none. Returns 2 row + 0 where f is not finite, 2 row + 1 where x' is not, and 2 row + 2 otherwise.
extern "C" int64_t fastsde_solver_step(const float* x, const float* f, const float* f_uncond, const float* history,
                                       const float* z, const int64_t* keys, const float* k, int64_t row,
                                       float guidance, float clip, int64_t n, int64_t size, float* out, float* data,
                                       int threads) {
    const Tensors at{x, f, f_uncond, history, z, out, data};
    const uint64_t draw = draw_offset(row + 1, SAMPLING);
    const Parts parts(n, size);
    int found = 2;
    for_parts(parts, threads, [&](int64_t, const Part& part) {
        const int64_t start = part.start(size);
        float drawn[PART];
        const float* noise = z ? z + start : keys ? drawn : nullptr;
        if (noise == drawn) draw_normals(keys, draw, part, n, drawn);
        const int here = step(at, start, part.count(), noise, k, guidance, clip);
        if (here < 2) {
#pragma omp critical
            found = std::min(found, here);
        }
    });
    return 2 * row + found;
}
