// The native kernels of the CPU, but for training and the U-Net, in one translation unit: it compiles faster than several.

#include "coefficients.cpp"
#include "dsm_loss.cpp"
#include "mlp_sampler.cpp"
#include "normal.cpp"
#include "perturb.cpp"
#include "sample_keys.cpp"
#include "solver_step.cpp"

// How many floats a vector has.
extern "C" int fastsde_lanes(int) { return LANES; }
