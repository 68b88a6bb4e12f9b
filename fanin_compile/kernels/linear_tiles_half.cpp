// The kernels of tiles on half vectors. With AVX-512, eight batch rows in vectors of eight lanes take 0.8 of the time they take in
// vectors of sixteen: packed x and the sums of a block fit the first-level cache. Of AVX2's vectors half gain nothing.
#define FANIN_HALF_VECTORS
#include "vec.h"

#if defined(FANIN_HALVED)
#include "linear_tiles.cpp"
#else
#include "linear.h"
namespace fanin {
const Tiling* half_tiling() { return nullptr; }
}  // namespace fanin
#endif
