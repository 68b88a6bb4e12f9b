// Two linear layers in one call: the hidden tile stays in cache, packed as the second layer reads it.
#include "linear.h"

namespace fanin {

void chain_gaps(const Chain& chain, int64_t stride, float* h) {
  const Structure& w = *chain.second.weight;
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk)
    __builtin_memset(h + (chunk * (w.width + 1) + w.width) * stride, 0, stride * sizeof(float));
}

void chain_hidden(const Chain& chain, const float* x, int64_t first, int64_t last, float* h) {
  const Structure& w = *chain.first.weight;
  float* sums = scratch(w.tallest() + 1, 1);
  for (int64_t block = first; block < last; ++block) {
    __builtin_memset(sums, 0, (w.tallest() + 1) * sizeof(float));
    run_row(chain.first, block, x, sums);
    finish_hidden(chain, 0, sums, w.first_row(block), w.first_row(block + 1), h);
  }
}

void chain_output(const Chain& chain, const float* h, int64_t first, int64_t last) {
  linear_dot(chain.second, 0, h, first, last);
}

void chain_hidden(const Chain& chain, int64_t lane, int64_t lanes, int64_t first, int64_t last, float* h) {
  const Structure& w = *chain.first.weight;
  const Tiling& tiling = tiling_for(chain.first.batch);
  const int64_t stride = tiling.stride_of(lanes);
  float* x = scratch(slots(w) * stride);
  float* sums = scratch((w.tallest() + 1) * stride, 1);
  tiling.pack(chain.first, lane, lanes, 0, w.chunks, x);
  for (int64_t block = first; block < last; ++block) {
    const int64_t r0 = w.first_row(block), r1 = w.first_row(block + 1);
    __builtin_memset(sums, 0, (r1 - r0) * stride * sizeof(float));
    tiling.run(chain.first, lanes, block, 0, w.chunks, x, sums);
    finish_hidden(chain, lanes, sums, r0, r1, h);
  }
}

void chain_output(const Chain& chain, int64_t lane, int64_t lanes, int64_t first, int64_t last, const float* h) {
  const Structure& w = *chain.second.weight;
  const Tiling& tiling = tiling_for(chain.first.batch);
  const int64_t stride = tiling.stride_of(lanes);
  float* sums = scratch((w.tallest() + 1) * stride, 1);
  for (int64_t block = first; block < last; ++block) {
    const int64_t r0 = w.first_row(block), r1 = w.first_row(block + 1);
    __builtin_memset(sums, 0, (r1 - r0) * stride * sizeof(float));
    tiling.run(chain.second, lanes, block, 0, w.chunks, h, sums);
    finish_tile(chain.second, lane, lanes, sums, r0, r1);
  }
}

}  // namespace fanin
