// One row of a solver's table (table.h), with optional guidance: f = c (f_uncond + w (f - f_uncond)), where sample b has
// w = scale[b] rates[row] and c = factor[b]; in a Langevin row D and z are multiplied by sizes[b].
//
// All tensors are contiguous fp32 [n, size].

#include "parts.h"
#include "table.h"

using namespace fastsde;

// The arguments of a call; _Call in solver_step.py has the same fields. ``slots`` and ``out`` hold m pointers, null for
// slots that the row does not read and for results that are not needed. The next row's n.s goes to ``input``. Nullable:
// f_uncond and with it scale, rates and factor (1 if null), z (else noise is drawn, if the row has any), keys (if no noise
// is drawn), input, sizes [n, 2]. clip is infinite if unset.
struct Step {
    const float* slots[MAX_SLOTS];
    float* out[MAX_SLOTS];
    const float *f, *f_uncond, *z, *sizes;
    float* input;
    const int64_t* keys;
    const float *table, *scale, *rates, *factor;
    int64_t m, row, n, size;
    float clip;
};

namespace {

// What a row has to compute.
template <int M>
struct Work {
    Row<M> row, next_row;
    bool formed[MAX_SLOTS] = {}, has_data = false, has_noise = false;

    explicit Work(const Step& at) : row{at.table + at.row * row_width(at.m), (int)at.m}, next_row{row} {
        if (at.input) next_row.k += row_width(at.m);
        for (int j = 0; j < row.slots(); j++) {
            formed[j] = j == 0 || at.out[j] || (at.input && next_row.n(j) != 0.0f);
            has_data |= formed[j] && row.e(j) != 0.0f;
            has_noise |= formed[j] && row.d(j) != 0.0f;
        }
    }
};

// A number for each sample of a part, by element: repeated for each, or once for all if the samples agree.
class Spread {
  public:
    // Takes numbers[stride * sample] * times.
    void set(const float* numbers, const Part& part, float times = 1.0f, int64_t stride = 1) {
        const float* own = numbers + stride * part.first_sample;
        each_ = false;
        for (int64_t i = 1; i < part.samples; i++) each_ |= own[stride * i] != own[0];
        all_ = all(times * own[0]);
        for (int64_t i = 0; each_ && i < part.samples; i++)
            std::fill_n(values_ + i * part.elements, part.elements, times * own[stride * i]);
    }

    Floats at(int64_t first, int64_t here) const { return each_ ? load(values_ + first, here) : all_; }

  private:
    bool each_;
    Floats all_;
    float values_[PART];
};

// What the elements of a part are multiplied by: w and c of guidance, and the sizes of D and z.
struct Factors {
    Spread w, c, data, z;

    Factors(const Step& at, const Part& part) {
        if (at.f_uncond) w.set(at.scale, part, at.rates ? at.rates[at.row] : 1.0f);
        if (at.f_uncond && at.factor) c.set(at.factor, part);
        if (at.sizes) data.set(at.sizes, part, 1.0f, 2), z.set(at.sizes + 1, part, 1.0f, 2);
    }
};

// Steps ``count`` elements from ``start`` on, where ``noise`` and the factors begin. Returns what is not finite: 0 f,
// 1 x', 2 nothing.
template <int M>
int step(const Step& at, const Work<M>& work, int64_t start, int64_t count, const float* noise, const Factors& by) {
    const Row<M> row = work.row;
    const int m = row.slots();
    Floats f_sum{}, x_sum{};  // 0, or NaN where a value was not finite
    for_lanes(count, [&](int64_t first, int64_t here) {
        const int64_t i = start + first;
        Floats s[MAX_SLOTS], next[MAX_SLOTS];
        for (int j = 0; j < m; j++) s[j] = at.slots[j] ? load(at.slots[j] + i, here) : Floats{};
        Floats f = load(at.f + i, here);
        if (at.f_uncond) {
            const Floats uncond = load(at.f_uncond + i, here);
            f_sum += 0.0f * (f + uncond);
            f = uncond + by.w.at(first, here) * (f - uncond);
            if (at.factor) f *= by.c.at(first, here);
        }
        f_sum += 0.0f * f;
        Floats z = noise ? load(noise + first, here) : Floats{};
        Floats data = work.has_data ? row.data(s, f, at.clip) : Floats{};
        if (at.sizes) data *= by.data.at(first, here), z *= by.z.at(first, here);
        for (int j = 0; j < m; j++) {
            next[j] = work.formed[j] ? row.slot(j, s, f, data, z) : Floats{};
            if (at.out[j]) store(at.out[j] + i, next[j], here);
        }
        x_sum += 0.0f * next[0];
        if (at.input) store(at.input + i, work.next_row.input(next), here);
    });
    return any_nan(f_sum) ? 0 : any_nan(x_sum) ? 1 : 2;
}

}  // namespace

// Takes the step. Returns what is not finite: 0 f, 1 the new slot 0, 2 nothing.
extern "C" int fastsde_solver_step(const Step* given, int threads) {
    const Step& at = *given;
    const uint64_t draw = draw_offset(at.row + 1, SAMPLING);
    const Parts parts(at.n, at.size);
    int found = 2;
    with_slots((int)at.m, [&](auto known) {
        const Work<known> work(at);
        for_parts(parts, threads, [&](int64_t, const Part& part) {
            const int64_t start = part.start(at.size);
            float drawn[PART];
            const float* noise = !work.has_noise ? nullptr : at.z ? at.z + start : drawn;
            if (noise == drawn) draw_normals(at.keys, draw, part, at.n, drawn);
            const int kind = step(at, work, start, part.count(), noise, Factors(at, part));
            if (kind < 2) {
#pragma omp critical
                found = std::min(found, kind);
            }
        });
    });
    return found;
}
