// Many batch rows, in tiles: x is packed, each block of rows computed, its sums finished. Where x is too wide to stay in the
// second-level cache, a window of its chunks at a time.
#include "linear.h"

namespace fanin {

const Tiling& tiling_for(int64_t batch) {
  const Tiling* half = half_tiling();
  return half && batch <= half->lanes ? *half : whole_tiling();
}

void linear_lanes(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last) {
  const Structure& w = *op.weight;
  const Tiling& tiling = tiling_for(op.batch);
  const int64_t stride = tiling.stride_of(lanes), chunk_floats = (w.width + 1) * stride;
  const int64_t most = window_bytes() / (chunk_floats * static_cast<int64_t>(sizeof(float)));
  const int64_t windows = most >= w.chunks ? 1 : most == 0 ? w.chunks : (w.chunks + most - 1) / most;
  const int64_t step = (w.chunks + windows - 1) / windows;
  // Between windows all sums are kept, otherwise those of a block.
  const int64_t row0 = w.first_row(first), spare = w.tallest() + 1;
  float* x = scratch(step * chunk_floats);
  float* sums = scratch((windows == 1 ? spare : w.first_row(last) - row0 + spare) * stride, 1);
  for (int64_t chunk0 = 0; chunk0 < w.chunks; chunk0 += step) {
    const int64_t chunk1 = chunk0 + step < w.chunks ? chunk0 + step : w.chunks;
    tiling.pack(op, lane, lanes, chunk0, chunk1, x);
    for (int64_t block = first; block < last; ++block) {
      const int64_t r0 = w.first_row(block), r1 = w.first_row(block + 1);
      float* y = windows == 1 ? sums : sums + (r0 - row0) * stride;
      if (chunk0 == 0) __builtin_memset(y, 0, (r1 - r0) * stride * sizeof(float));
      tiling.run(op, lanes, block, chunk0, chunk1, x, y);
      if (chunk1 == w.chunks) finish_tile(op, lane, lanes, y, r0, r1);
    }
  }
}

}  // namespace fanin
