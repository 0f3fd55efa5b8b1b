// Keys of samples (the twin of fastsde.noise.sample_keys): the words of block first + i under the seed.

#include "philox.h"
#include "team.h"

using namespace fastsde;

// Writes the keys [n, 2] to ``out``.
extern "C" void fastsde_sample_keys(int64_t seed, int64_t first, int64_t n, int64_t* out, int threads) {
    run_team(n > 1024 ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t start = 0; start < n; start += BLOCKS) {
            Longs counter;
            for (int i = 0; i < BLOCKS; i++) counter[i] = (uint64_t)first + (uint64_t)(start + i);
            const Block x = philox((uint64_t)seed + Longs{}, counter);
            const Longs low = (x.w0 & 0xFFFFFFFFull) | x.w1 << 32, high = (x.w2 & 0xFFFFFFFFull) | x.w3 << 32;
            for (int64_t i = 0; i < std::min<int64_t>(BLOCKS, n - start); i++) {
                out[2 * (start + i)] = (int64_t)low[i];
                out[2 * (start + i) + 1] = (int64_t)high[i];
            }
        }
    });
}
