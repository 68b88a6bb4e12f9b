// Interface of the convolution kernels: plain data, no torch headers. Layouts and derivations: CONV.md.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "linear.h"

namespace fanin::conv {

// One run of non-zeros of one row inside one chunk of channels.
struct Visit {
  int32_t start;                // position in values and indices
  uint16_t row;                 // row inside its block
  uint16_t count;
};

using Dims = std::array<int64_t, 3>;            // depth, height, width; 1d and 2d fill the front with ones

struct Shape {
  bool paired;                  // batches of more than one image: two may share a tile
  int64_t in_channels, out_channels, groups;
  Dims in, kernel, stride, padding, dilation, out;
  bool operator==(const Shape&) const = default;

  int64_t group_channels() const { return in_channels / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels_in() const { return in[0] * in[1] * in[2]; }
  int64_t pixels_out() const { return out[0] * out[1] * out[2]; }
};

// 1x1x1 at stride 1 without padding does not see the shape of the image: the pixels become one row.
Shape flatten_pointwise(const Shape& shape);

// One padded plane of a channel: the pixels (z * stride + phase, ...) of the image.
struct Phase {
  Dims at;
};

// Where the pixels of an image stand. A position is z * slice + y * pitch + x; output pixels and the input pixels of every
// phase share this numbering, so that a tap is a constant distance and kLanes outputs are one unit-stride load.
struct Layout {
  bool pointwise;               // one tap, positions are pixels: the offset of a non-zero is its channel
  int64_t pitch, rows;          // positions in one row, rows in one slice
  Dims halo;                    // zero rows and columns in front of the image; those behind are shared with the next row
  std::vector<Phase> phases;
  std::vector<int64_t> tap;     // [taps] position of each tap relative to its output, without the phase
  std::vector<int32_t> tap_phase;
  int64_t low, span;            // smallest tap, and largest - smallest
  int64_t lanes;                // positions from the first output of an image to its last, both included
  int64_t images;               // images in one tile: 1 or 2
  int64_t tiles, tiles_per_unit, units;         // tiles of an image; those packed together; packs of an image
  int64_t plane, channel;       // floats of one packed plane (of one channel)
  int64_t chunk;                // channels of one chunk

  // vectors [first(i), first(i + 1)) of kLanes outputs are tile i
  int64_t first(int64_t tile) const;
};

inline constexpr int kMaxTile = 14;             // accumulators of a tile; with one weight and one spare they fill 16 registers
inline constexpr int64_t kBlockRows = 512;      // most rows of one block: their sums stay in L2
inline constexpr int64_t kMaxOffset = UINT16_MAX;
inline constexpr int64_t kVisitsAhead = 4;      // runs whose weights are requested early

// False if one channel's packed tile exceeds what offsets of 16 bits reach.
bool make_layout(const Shape& shape, Layout& layout);

// Runs of one chunk and block in the order: whole rows, first runs of a row, middle runs, last runs; each part by count.
struct Stage {
  int64_t channel;              // first channel of the chunk, to which the offsets are relative
  int64_t begin, whole, first, middle, end;     // where the parts end in visits
};

struct Plan {
  Shape shape;                  // flattened if pointwise
  Layout layout;
  std::vector<int32_t> live;    // output channel of each row with at least one non-zero, in the order of the blocks
  std::vector<int32_t> dead;    // all other output channels
  std::vector<int64_t> block;   // [blocks + 1] first live row of each block
  std::vector<std::vector<Stage>> stages;       // [blocks]
  std::vector<Visit> visits;
  std::vector<uint16_t> offsets;                // one per non-zero, parallel to values; empty if the indices serve

  int64_t blocks() const { return static_cast<int64_t>(stages.size()); }
  int64_t nbytes() const;
};

struct Structure {
  const void* indices;
  const int32_t* row_ptr;       // [n + 1] or null
  const int32_t* rows;          // [n] or null
  int64_t n, k;
  IType type;
  int64_t begin(int64_t r) const { return row_ptr ? row_ptr[r] : r * k; }
};

// Null, or what is wrong with the structure. The number of blocks is a multiple of split.
const char* build_plan(const Structure& structure, const Shape& shape, const Layout& layout, int64_t split, Plan& plan);

// y = act(conv(x) + bias + residual)
struct Op {
  const Plan* plan;
  const void *x, *values, *bias, *residual;     // residual as y; bias [out_channels]; both may be null
  const uint16_t* offsets;
  void* y;
  int64_t batch;
  DType x_type, value_type, bias_type;          // residual and y have x's type
  bool channels_last;                           // of x, residual and y
  Act act;
};

// Floats of scratch that one run() needs on its thread.
int64_t scratch_floats(const Plan& plan, int64_t first_block, int64_t last_block);
// Images [image, image + images), one unit of their tiles, blocks [first, last).
void run(const Op& op, int64_t image, int64_t images, int64_t unit, int64_t first_block, int64_t last_block, float* scratch);
// The output channels that no row reaches, of one image.
void run_dead(const Op& op, int64_t image);

// ---- parts -----------------------------------------------------------------------------------------------------------

// The positions that a unit of tiles reads: planes[in_channels][Layout::channel]. Writes up to a vector behind its end.
void pack(const Op& op, int64_t image, int64_t unit, float* planes);

// A run of consecutive outputs: sums[lane + i] belongs to pixel + i.
struct Piece {
  int64_t lane, pixel, count;
};
// Rows [first, last) of live, sums[last - first][stride].
void store(const Op& op, int64_t image, const std::vector<Piece>& pieces, const float* sums, int64_t stride, int64_t first,
           int64_t last);

}  // namespace fanin::conv
