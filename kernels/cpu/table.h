// A solver's table, and one row of it (the twin of fastsde.reference.solver_step), of m slots s:
//
//     D  = p.s + q f                      clamped to [-clip, clip]; clip is infinite if there is none
//     s' = A s + b f + e D + d z
//
// A row is fp32 [2 + 5 m + m^2]: time, q, n, p, b, e, d [m each], A [m, m].

#pragma once

#include <type_traits>

#include "simd.h"

namespace fastsde {

constexpr int MAX_SLOTS = 8;

static inline int64_t row_width(int64_t m) { return 2 + 5 * m + m * m; }

// M is the number of slots if it is known at compile time, else 0.
template <int M = 0>
struct Row {
    const float* k;
    int given;

    int slots() const { return M ? M : given; }
    float time() const { return k[0]; }
    float q() const { return k[1]; }
    float n(int i) const { return k[2 + i]; }
    float p(int i) const { return k[2 + slots() + i]; }
    float b(int j) const { return k[2 + 2 * slots() + j]; }
    float e(int j) const { return k[2 + 3 * slots() + j]; }
    float d(int j) const { return k[2 + 4 * slots() + j]; }
    float A(int j, int i) const { return k[2 + (5 + j) * slots() + i]; }

    bool has_noise() const {
        for (int j = 0; j < slots(); j++)
            if (d(j) != 0.0f) return true;
        return false;
    }

    // Whether the network is called with something other than slot 0 itself.
    bool has_input() const {
        for (int i = 0; i < slots(); i++)
            if (n(i) != (i == 0 ? 1.0f : 0.0f)) return true;
        return false;
    }

    // The old slot that the new slot j takes over unchanged, or -1.
    int source(int j) const {
        int found = -1;
        if (b(j) != 0.0f || e(j) != 0.0f || d(j) != 0.0f) return -1;
        for (int i = 0; i < slots(); i++) {
            if (A(j, i) == 0.0f) continue;
            if (A(j, i) != 1.0f || found >= 0) return -1;
            found = i;
        }
        return found;
    }

    // D of LANES elements. Operands of zero coefficients do not matter, even if they are not finite.
    Floats data(const Floats* s, Floats f, float clip) const {
        Floats sum{};
        if (q() != 0.0f) sum += q() * f;
        for (int i = 0; i < slots(); i++)
            if (p(i) != 0.0f) sum += p(i) * s[i];
        return at_least(at_most(sum, clip), -clip);
    }

    // The new slot j of LANES elements.
    Floats slot(int j, const Floats* s, Floats f, Floats data, Floats z) const {
        Floats sum{};
        for (int i = 0; i < slots(); i++)
            if (A(j, i) != 0.0f) sum += A(j, i) * s[i];
        if (b(j) != 0.0f) sum += b(j) * f;
        if (e(j) != 0.0f) sum += e(j) * data;
        if (d(j) != 0.0f) sum += d(j) * z;
        return sum;
    }

    Floats input(const Floats* s) const {
        Floats sum{};
        for (int i = 0; i < slots(); i++)
            if (n(i) != 0.0f) sum += n(i) * s[i];
        return sum;
    }
};

// Runs body(std::integral_constant<int, M>), where M is m for the usual numbers of slots and 0 for others.
template <class Body>
static inline void with_slots(int m, Body body) {
    switch (m) {
        case 1: return body(std::integral_constant<int, 1>());
        case 2: return body(std::integral_constant<int, 2>());
        case 3: return body(std::integral_constant<int, 3>());
        default: return body(std::integral_constant<int, 0>());
    }
}

}  // namespace fastsde
