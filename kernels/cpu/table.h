// A solver's table, and one row of it (the twin of fastsde.reference.solver_step):
//
//     D  = p x + q f                      clamped to [-clip, clip], which is infinite where there is no clip
//     x' = a x + b f + c H + e D + d z
//
// A row is its eight fp32 columns.

#pragma once

#include "simd.h"

namespace fastsde {

enum Column { TIME, A, B, C, D, E, P, Q, TABLE_COLUMNS };

// x' and D of LANES elements. What a row has no coefficient for does not matter, even where it is not finite.
static inline Floats row_of(const float* k, float clip, Floats x, Floats f, Floats history, Floats noise,
                            Floats& data) {
    data = at_least(at_most(k[P] * x + k[Q] * f, clip), -clip);
    Floats next = k[A] * x + k[B] * f;
    if (k[C] != 0.0f) next += k[C] * history;
    if (k[E] != 0.0f) next += k[E] * data;
    if (k[D] != 0.0f) next += k[D] * noise;
    return next;
}

}  // namespace fastsde
