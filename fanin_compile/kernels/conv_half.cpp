// The kernels of convolutions on half vectors, for cores that take twice as long over whole ones: see kernels_for().
#define FANIN_HALF_VECTORS
#include "vec.h"

#if defined(FANIN_HALVED)
#include "conv_layout.cpp"
#include "conv_pack.cpp"
#include "conv_run.cpp"
#include "conv_store.cpp"
#include "conv_weave.cpp"
#else
#include "conv.h"
namespace fanin::conv {
const Kernels* half_kernels() { return nullptr; }
}  // namespace fanin::conv
#endif
