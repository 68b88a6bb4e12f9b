// What the files of the convolution kernels have of one another, once for each width of vectors that they are compiled for.
#pragma once

#include "conv.h"
#include "vec.h"

namespace fanin::conv {

inline constexpr int64_t kLine = 64 / sizeof(float);          // floats of a cache line
inline constexpr int64_t kChannelsAhead = 3;                  // channels lie far apart: their pixels are requested early

// Where the outputs of a tile stand in y: the element of output channel 0, or -1 for lanes beyond the image or the batch.
struct Places {
  int64_t at[kMaxTile][kMaxLanes];
  int64_t channel;              // elements from one output channel to the next
};

inline namespace FANIN_WIDTH {

bool make_layout(const Structure& weight, const Shape& shape, Layout& layout);
// Spatial layers: Layout's tables for it, and the packing itself, of what rows of outputs read, numbered as in Weave::Row.
void make_weaves(const Shape& shape, Layout& layout);
void weave(const Op& op, int64_t image, int64_t unit, Range outputs, float* planes);
// x of a unit. Spatial: what these rows of outputs read, [in_channels][Layout::channel], from the first position of the unit's
// first row. Pointwise: of these tiles, [tile][chunk][channels of it, and one of zeros behind them if rows go side by side][Layout::channel].
void pack(const Op& op, int64_t image, int64_t unit, Range tiles, Range outputs, float* planes);
int64_t pack_floats(const Geometry& geometry);  // that it needs, for planes and itself
// Rows [first, last) of the live ones, sums[last - first][tile].
void store(const Op& op, const Tile& tile, const Places& places, const float* sums, int64_t first, int64_t last);
void run_dead(const Op& op, int64_t image);

}  // namespace bytesN
}  // namespace fanin::conv
