// Interface of the convolution kernels: plain data, no torch headers. Layouts and derivations: CONV.md.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "linear.h"

namespace fanin::conv {

using Dims = std::array<int64_t, 3>;            // depth, height, width; 1d and 2d fill the front with ones

struct Shape {
  int64_t images;               // of a batch, that may share a vector: a power of two, at most kMaxLanes
  int64_t in_channels, out_channels, groups;
  Dims in, kernel, stride, padding, dilation, out;
  bool operator==(const Shape&) const = default;

  int64_t group_channels() const { return in_channels / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels_in() const { return in[0] * in[1] * in[2]; }
  int64_t pixels_out() const { return out[0] * out[1] * out[2]; }
};

inline constexpr int64_t kMaxLanes = 16;        // of the widest vector; images beyond it cannot share one

// 1x1x1 at stride 1 without padding does not see the shape of the image: the pixels become one row.
Shape flatten_pointwise(const Shape& shape);

// `parts` rows of `vectors` outputs, from output (z, y, x) of a block; of a pointwise layer, from vector x.
struct Tile {
  int64_t z, y, x;
  int parts, vectors;
};

// Where the pixels stand. Spatial layers: the lanes of a vector are one pixel each of kLanes blocks of equal size, into
// which a group of images is cut, and a block has its own halo. All blocks, and the input pixels of every phase, share the
// numbering (z * rows + y) * pitch + x, so that a tap is a constant number of vectors away and every load is aligned.
// Pointwise layers: the lanes are consecutive pixels of a group of images.
struct Layout {
  bool pointwise;
  int64_t images;               // of a group
  Dims blocks;                  // into which an image is cut: with images, kLanes together
  Dims block;                   // outputs of one block
  Dims low;                     // smallest shift of a tap
  int64_t pitch, rows;          // vectors in one row, rows in one slice
  std::vector<Dims> phases;     // the pixels p with p % stride == phase
  std::vector<int64_t> tap;     // [taps] vectors from an output to the tap's input, in the tap's phase
  std::vector<int32_t> tap_phase;
  int64_t span;                 // largest tap
  int64_t vector;               // kLanes, for who does not know the vectors
  std::vector<Tile> tiles;
  std::vector<int64_t> unit;    // [units + 1] first tile of each unit: tiles packed together
  int64_t plane, channel;       // floats of one phase, and of one channel; pointwise: of one channel in one tile
  int64_t chunk;                // channels whose x of one tile fits L1
  int together;                 // rows whose runs are computed side by side: 1, or kTogether in narrow tiles

  // First output of block i along dimension d: the last block overlaps the one before where they do not come out even.
  int64_t start(const Shape& s, int d, int64_t i) const {
    const int64_t even = i * block[d], most = s.out[d] - block[d];
    return even < most ? even : most;
  }
  int64_t units() const { return static_cast<int64_t>(unit.size()) - 1; }
  int64_t at(const Tile& t) const { return pointwise ? t.x : (t.z * rows + t.y) * pitch + t.x; }
  int64_t stop(const Tile& t) const { return at(t) + (t.parts - 1) * pitch + t.vectors; }
  int64_t chunks(const Shape& s) const { return (s.in_channels + chunk - 1) / chunk; }
};

inline constexpr int kMaxTile = 14;             // accumulators of a tile; with one weight and one spare they fill 16 registers
inline constexpr int kMaxParts = 4;
inline constexpr int kTogether = 4, kNarrow = 3;              // rows side by side, and vectors of their tiles
inline constexpr int64_t kBlockRows = 512;      // most rows of one block: their sums stay in L2
inline constexpr int64_t kMaxOffset = UINT16_MAX;

// For rows of fan_in non-zeros. False if one channel's packed unit exceeds what offsets of 16 bits reach.
bool make_layout(const Shape& shape, double fan_in, Layout& layout);

// Visits of one chunk and block: whole rows, then first runs of a row, middle runs, last runs; each part by count.
struct Stage {
  int64_t channel;              // first of the chunk, to which the offsets are relative
  int64_t nonzero;              // where its values and offsets start
  int64_t begin;                // its first visit
  int64_t end[4];               // where the visits of whole rows, first, middle and last runs end
};

// A visit is `together` runs, each the non-zeros of one row in one chunk. Shorter runs are filled up with zeros.
struct Plan {
  Shape shape;                  // flattened if pointwise
  Layout layout;
  std::vector<int32_t> live;    // output channel of each row with at least one non-zero, in the order of the blocks
  std::vector<int32_t> dead;    // all other output channels
  std::vector<int64_t> block;   // [blocks + 1] first live row of each block
  std::vector<std::vector<Stage>> stages;       // [blocks]
  std::vector<uint16_t> counts; // [visits] non-zeros of each run
  std::vector<uint16_t> rows;   // [visits][together] inside the block
  std::vector<uint16_t> offsets;                // in visiting order, floats from the chunk's first channel
  std::vector<float> values;    // likewise

  int64_t blocks() const { return static_cast<int64_t>(stages.size()); }
  int64_t nbytes() const;
};

struct Structure {
  const void* indices;
  const void* values;
  const int32_t* row_ptr;       // [n + 1] or null
  const int32_t* rows;          // [n] or null
  int64_t n, k;
  IType type;
  DType value_type;
  int64_t begin(int64_t r) const { return row_ptr ? row_ptr[r] : r * k; }
};

// Null, or what is wrong with the structure. The number of blocks is a multiple of split.
const char* build_plan(const Structure& structure, const Shape& shape, const Layout& layout, int64_t split, Plan& plan);

// y = act(conv(x) + bias + residual)
struct Op {
  const Plan* plan;
  const void *x, *bias, *residual;              // residual as y; bias [out_channels]; both may be null
  void* y;
  int64_t batch;
  DType x_type, bias_type;                      // residual and y have x's type
  bool channels_last;                           // of x, residual and y
  Act act;
};

// Floats of scratch that one run() needs on its thread.
int64_t scratch_floats(const Plan& plan, int64_t first_block, int64_t last_block);
// The group of images that starts at `image`, one unit of their tiles, blocks [first, last).
void run(const Op& op, int64_t image, int64_t unit, int64_t first_block, int64_t last_block, float* scratch);
// The output channels that no row reaches, of one image.
void run_dead(const Op& op, int64_t image);

// ---- parts -----------------------------------------------------------------------------------------------------------

// x of a unit's tiles. Spatial: [in_channels][Layout::channel], from the first position of the unit's first row.
// Pointwise: [tile][chunk][channels of it, and one of zeros][Layout::channel].
void pack(const Op& op, int64_t image, int64_t unit, float* planes);
int64_t pack_floats(const Plan& plan);          // that it needs, for planes and itself
int64_t packed_channels(const Plan& plan);      // of a tile, those of zeros included
int64_t chunk_at(const Layout& layout, int64_t channel);      // floats from a unit's or a tile's x to that of a chunk

// Where the outputs of a tile stand in y: the element of output channel 0, or -1 for lanes beyond the image or the batch.
struct Places {
  int64_t at[kMaxTile][kMaxLanes];
  int64_t channel;              // elements from one output channel to the next
};
// Rows [first, last) of live, sums[last - first][tile].
void store(const Op& op, const Tile& tile, const Places& places, const float* sums, int64_t first, int64_t last);

}  // namespace fanin::conv
