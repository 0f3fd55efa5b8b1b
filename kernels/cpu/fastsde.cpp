// The native kernels of the CPU in one translation unit, which compiles in the time of one.

#include "dsm_loss.cpp"
#include "mlp_sampler.cpp"
#include "normal.cpp"
#include "perturb.cpp"
#include "solver_step.cpp"
