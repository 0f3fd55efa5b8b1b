// The factor of rescaled guidance (the twin of fastsde.reference.rescale_factor), for each sample:
//
//     c = phi std(f) / std(g) + 1 - phi,   g = f_uncond + w (f - f_uncond),   w = scale[b] rates[row]
//
// A sample is summed in pieces, in an order that depends only on its size.

#include "parts.h"

using namespace fastsde;

namespace {

// The mean and the sum of squared deviations of the values so far (Chan, Golub & LeVeque 1983).
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void add(const float* x, int64_t n) {
        const double here = sum(x, n, 0.0f, [](auto v) { return v; }) / (double)n;
        const double apart = sum(x, n, (float)here, [](auto v) { return v * v; });
        const double shift = here - mean, share = (double)n / (count + (double)n);
        mean += shift * share;
        squares += apart + shift * shift * count * share;
        count += (double)n;
    }

  private:
    template <class Function>
    static double sum(const float* x, int64_t n, float center, Function function) {
        Floats sums{};
        int64_t e = 0;
        for (; e + LANES <= n; e += LANES) sums += function(load(x + e) - center);
        double total = sum_of(sums);
        for (; e < n; e++) total += function(x[e] - center);
        return total;
    }
};

}  // namespace

// Writes the factors [n]. f and f_uncond are [n, size], scale [n]; rates [K] may be null, for 1.
extern "C" void fastsde_rescale_factor(const float* f, const float* f_uncond, const float* scale, const float* rates,
                                       int64_t row, float phi, int64_t n, int64_t size, float* factor, int threads) {
    const float rate = rates ? rates[row] : 1.0f;
    run_team(n * size > PART ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n; i++) {
            const float w = rate * scale[i];
            Moments of_f, of_g;
            for (int64_t first = 0; first < size; first += PART) {
                const int64_t count = std::min(PART, size - first);
                const float *own = f + i * size + first, *other = f_uncond + i * size + first;
                float g[PART];
                for (int64_t e = 0; e < count; e++) g[e] = other[e] + w * (own[e] - other[e]);
                of_f.add(own, count);
                of_g.add(g, count);
            }
            factor[i] = of_g.squares > 0 ? phi * (float)std::sqrt(of_f.squares / of_g.squares) + (1.0f - phi) : 1.0f;
        }
    });
}
