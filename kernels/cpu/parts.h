// How a batch [n, *shape] is cut into parts that threads take, and how they draw normals.
//
// A part depends only on the shape, and every element only on its own position, so that no result depends on the number
// of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "philox.h"
#include "team.h"

namespace fastsde {

constexpr int64_t PART = 2048;  // the most elements in a part; a multiple of 2 LANES

// Whole samples, or a piece of one: elements first_element to first_element + elements - 1 of each of its samples.
struct Part {
    int64_t first_sample, samples, first_element, elements;

    int64_t start(int64_t size) const { return first_sample * size + first_element; }
    int64_t count() const { return samples * elements; }
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Parts {
    int64_t samples, size, samples_each, parts_each;

    Parts(int64_t samples, int64_t size) : samples(samples), size(size) {
        samples_each = std::max<int64_t>(1, PART / std::max<int64_t>(size, 1));
        samples_each = samples_each > LANES ? samples_each / LANES * LANES : samples_each;
        parts_each = samples_each > 1 ? 1 : std::max<int64_t>(1, ceil_div(size, PART));
    }

    int64_t count() const { return ceil_div(samples, samples_each) * parts_each; }

    Part operator[](int64_t i) const {
        if (parts_each > 1) {
            const int64_t first = i % parts_each * PART;
            return Part{i / parts_each, 1, first, std::min(PART, size - first)};
        }
        const int64_t first = i * samples_each;
        return Part{first, std::min(samples_each, samples - first), 0, size};
    }
};

// Runs body(i, part) for every part. Each thread takes a run of consecutive parts.
template <class Body>
static inline void for_parts(const Parts& parts, int threads, Body body) {
    const int64_t count = parts.count();
    run_team(count > 1 ? threads : 1, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i++) body(i, parts[i]);
    });
}

// Writes the part's normals to ``to`` [samples, elements].
static inline void draw_normals(const int64_t* keys, uint64_t draw, const Part& part, int64_t samples, float* to) {
    if (part.first_element == 0 && part.elements < 2 * LANES) {
        for (int64_t first = 0; first < part.samples; first += LANES) {
            const Keys lanes = Keys::load(keys, part.first_sample + first, samples);
            const int64_t here = std::min<int64_t>(LANES, part.samples - first);
            for (int64_t element = 0; element < part.elements; element += 4) {
                Floats z[4];
                const int64_t of_block = std::min<int64_t>(4, part.elements - element);
                normals_across(lanes, draw + (uint64_t)element / 4, of_block, z);
                for (int64_t i = 0; i < here; i++)
                    for (int64_t j = 0; j < of_block; j++) to[(first + i) * part.elements + element + j] = z[j][i];
            }
        }
        return;
    }
    for (int64_t i = 0; i < part.samples; i++, to += part.elements) {
        const uint64_t seed = (uint64_t)keys[2 * (part.first_sample + i)];
        const uint64_t offset = (uint64_t)keys[2 * (part.first_sample + i) + 1] + draw;
        const uint64_t block = (uint64_t)part.first_element / 4;
        int64_t element = 0;
        for (; element + 2 * LANES <= part.elements; element += 2 * LANES)
            normals_of(seed, offset, block + element / 4, to + element);
        if (element < part.elements) {
            float rest[2 * LANES];
            normals_of(seed, offset, block + element / 4, rest);
            std::copy(rest, rest + (part.elements - element), to + element);
        }
    }
}

}  // namespace fastsde
