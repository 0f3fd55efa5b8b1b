// The native CPU kernels except training and the U-Net, in one translation unit, which compiles faster than several.

#include "coefficients.cpp"
#include "dsm_loss.cpp"
#include "guidance_rescale.cpp"
#include "langevin_size.cpp"
#include "mlp_sampler.cpp"
#include "normal.cpp"
#include "perturb.cpp"
#include "sample_keys.cpp"
#include "solver_step.cpp"

// The number of floats in a vector.
extern "C" int fastsde_lanes(int) { return LANES; }
