// Interface of the convolution kernels: plain data, no torch headers. Layouts and derivations: CONV.md.
#pragma once

#include <algorithm>
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
  int64_t sharers;              // threads that one image must keep busy, as the batch alone does not come out even: 1 if it does
  bool operator==(const Shape&) const = default;

  int64_t group_channels() const { return in_channels / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels_in() const { return in[0] * in[1] * in[2]; }
  int64_t pixels_out() const { return out[0] * out[1] * out[2]; }
  bool pointwise() const { return taps() == 1 && padding == Dims{}; }
};

inline constexpr int64_t kMaxLanes = 16;        // of the widest vector; images beyond it cannot share one

// 1x1x1 at stride 1 without padding does not see the shape of the image: the pixels become one row. Other strides choose
// among the pixels of the input.
inline Shape flatten_pointwise(const Shape& s) {
  constexpr Dims ones{1, 1, 1}, none{0, 0, 0};
  if (s.taps() != 1 || s.stride != ones || s.padding != none) return s;
  Shape flat = s;
  flat.in = flat.out = {1, 1, s.pixels_out()};
  flat.dilation = ones;
  return flat;
}

// `parts` rows of `vectors` outputs, from output (z, y, x) of a block; of a pointwise layer, from vector x.
struct Tile {
  int64_t z, y, x;
  int parts, vectors;
};

struct Range {
  int64_t first, last;          // [first, last)
};

// How x of a unit gets into the lanes. A row: kLanes rows of pixels, one for each lane, in one phase of z and y.
struct Weave {
  struct Row {
    int64_t kind;               // of its columns, see Layout::column_out
    int64_t out;                // floats to its first vector
    std::array<int64_t, kMaxLanes> at;          // elements of channel 0 to the first column of each lane
    int64_t least, most;        // elements that it reads, padding and lanes that are zeros included: [least, most)
    Range outputs;              // rows of the blocks that read it, numbered as Layout::at() / pitch
    Range lines;                // of Weave::lines: those that no row before it has
  };
  std::vector<Row> rows;
  std::vector<int64_t> lines;   // an element of each cache line of channel 0
};

// Where the pixels stand. Spatial layers: the lanes of a vector are one pixel each of kLanes blocks of equal size, into
// which a group of images is cut, and a block has its own halo. All blocks, and the input pixels of every phase, share the
// numbering (z * rows + y) * pitch + x, so that a tap is a constant number of vectors away and every load is aligned.
// Pointwise layers (1x1x1 without padding): the lanes are consecutive outputs of a group of images.
struct Layout {
  bool pointwise;
  int64_t images;               // of a group
  int64_t bands;                // of rows of outputs, equal ones, into which an image is cut before all else: a thread's own
  Dims blocks;                  // into which a band of an image is cut: with images, kLanes together
  Dims block;                   // outputs of one block
  Dims low;                     // smallest shift of a tap
  int64_t pitch, rows;          // vectors in one row, rows in one slice
  std::vector<Dims> phases;     // the pixels p with p % stride == phase
  std::vector<uint32_t> taps;   // [taps] vectors from an output to the tap's input
  int64_t span;                 // largest tap
  std::vector<Tile> tiles;
  std::vector<int64_t> unit;    // [units of a band + 1] first tile of each unit: tiles packed together
  int64_t unit_tiles, unit_rows;                // of the largest: tiles, and rows of all of them
  int64_t plane, channel;       // floats of one phase, and of one channel; pointwise: of one channel in one tile
  std::vector<Weave> weaves;    // [units()], spatial layers only, as all of these:
  int64_t columns;              // of a row that are read: whole pieces
  std::vector<int32_t> column_out;              // [kinds][columns] floats from Row::out to a column's vector, or -1
  std::vector<int32_t> column_inside;           // [kinds][columns][kLanes] all ones, or zero where a lane is padding
  int64_t chunk;                // the weight's
  int together;                 // runs of a visit: 1, or kTogether in narrow tiles
  bool cheap_loads;             // of this core, which choose the microkernel of runs side by side

  int64_t outputs(const Shape& s, int d) const { return d == 1 ? s.out[1] / bands : s.out[d]; }      // of a band
  // First output of block i along dimension d, in its band: the last block overlaps the one before where they do not come out even.
  int64_t start(const Shape& s, int d, int64_t i) const { return std::min(i * block[d], outputs(s, d) - block[d]); }
  int64_t units() const { return bands * units_of_band(); }     // band by band
  int64_t band_of(int64_t u) const { return u / units_of_band(); }
  Range tiles_of(int64_t u) const { return {unit[u % units_of_band()], unit[u % units_of_band() + 1]}; }
  int64_t rows_in(int64_t u) const {            // of the tiles of a unit
    int64_t sum = 0;
    const auto [first, last] = tiles_of(u);
    for (int64_t i = first; i < last; ++i) sum += tiles[i].parts;
    return sum;
  }
  int64_t at(const Tile& t) const { return pointwise ? t.x : (t.z * rows + t.y) * pitch + t.x; }
  int64_t stop(const Tile& t) const { return at(t) + (t.parts - 1) * pitch + t.vectors; }
  // Threads share blocks of rows of the weight, or else the tiles of a unit. Pointwise tiles where there are enough: their pixels
  // are those whose inputs a thread wrote in the layer before.
  static constexpr int64_t kEnoughTiles = 8;
  bool by_block(int64_t of_weight) const { return of_weight > 1 && !(pointwise && unit_rows >= kEnoughTiles); }
  int64_t parts(int64_t of_weight) const { return by_block(of_weight) ? of_weight : unit_rows; }    // of a unit, at most
  int64_t chunk_channels() const { return chunk + (together > 1); }     // as packed
  int64_t chunks(const Shape& s) const { return (s.in_channels + chunk - 1) / chunk; }
  int64_t packed_channels(const Shape& s) const { return pointwise ? chunks(s) * chunk_channels() : s.in_channels; }

 private:
  int64_t units_of_band() const { return static_cast<int64_t>(unit.size()) - 1; }
};

inline constexpr int kMaxTile = 14;             // accumulators of a tile; with one weight and one spare they fill 16 registers
inline constexpr int kMaxParts = 4;
inline constexpr int kTogether = 4, kNarrow = 3;              // rows side by side, and vectors of their tiles

// A (block of rows, chunk of channels): its first entry, and the first visit of whole rows, first, middle and last runs.
struct Stage {
  int32_t entry, visit[4];
};

// The structure of a packed weight, as packing_conv.py writes it: this header, then arrays at the offsets it names. A visit
// is `together` runs, each the non-zeros of one row in one chunk; an entry is a value and a code:
// channel << bits | tap, or of runs side by side the bytes from its chunk to its channel for each lane.
struct Structure {
  static constexpr int64_t kVersion = 0x0fa1c001;
  int64_t version, bytes;       // bytes of all of it
  int64_t out, group_channels, groups, taps, nnz;
  int64_t chunk;                // channels
  int64_t together;             // 1, or kTogether
  int64_t blocks, live;         // block b is rows [live * b / blocks, live * (b + 1) / blocks)
  int64_t entries, visits, longest;             // longest: entries of a stage, at most
  int64_t rows_at, stages_at, counts_at, order_at, codes_at;
  int64_t unused[1];

  int64_t first_row(int64_t block) const { return live * block / blocks; }
  int64_t tallest() const { return (live + blocks - 1) / blocks; }
  int64_t chunks() const { return std::max<int64_t>(1, (group_channels * groups + chunk - 1) / chunk); }
  double fan_in() const { return static_cast<double>(nnz) / static_cast<double>(std::max<int64_t>(live, 1)); }
  template <class T>
  const T* at(int64_t offset) const { return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset); }
  const int32_t* rows() const { return at<int32_t>(rows_at); }          // [out] output channels: the live ones, then the others
  const Stage* stages() const { return at<Stage>(stages_at); }          // [blocks * chunks + 1]
  const uint16_t* counts() const { return at<uint16_t>(counts_at); }    // [visits] entries of each run
  const uint16_t* order() const { return at<uint16_t>(order_at); }      // [visits][together] rows inside the block
  const uint16_t* codes() const { return at<uint16_t>(codes_at); }      // [entries]
};

struct Kernels;

// All that depends on the image.
struct Geometry {
  Shape shape;                  // flattened if pointwise
  const Kernels* kernels;
  Layout layout;                // theirs
};

// y = act(conv(x) + bias + residual)
struct Op {
  const Structure* weight;
  const Geometry* geometry;
  const void* values;           // [weight->entries]
  const void *x, *bias, *residual;              // residual as y; bias [out_channels]; both may be null
  void* y;
  int64_t batch;
  DType x_type, value_type, bias_type;          // residual and y have x's type
  bool channels_last;                           // of x, residual and y
  Act act;
};

// What of a unit one thread computes: of its `parts` equal parts of blocks of rows, or of its tiles' rows where there is one block.
struct Part {
  int64_t part, parts;
};

// The kernels on vectors of one width.
struct Kernels {
  int64_t lanes;                // of a vector
  // Shape as flatten_pointwise() gives it. False if the weight is packed for pointwise layers only and this is none, or if a
  // chunk of x exceeds what offsets of 32 bits reach.
  bool (*make_layout)(const Structure& weight, const Shape& shape, Layout& layout);
  // Floats of scratch that a run() needs on its thread.
  int64_t (*scratch_floats)(const Op& op);
  // The group of images that starts at `image`, one unit of their tiles.
  void (*run)(const Op& op, int64_t image, int64_t unit, Part part, float* scratch);
  // The output channels that no row reaches, of one image.
  void (*run_dead)(const Op& op, int64_t image);
};
const Kernels& whole_kernels();
const Kernels* half_kernels();                                // null where there are no vectors of AVX-512 to halve
// The faster ones on this core.
const Kernels& kernels_for(const Shape& shape);
// Since Golden Cove, the first with AVX-VNNI, Intel's cores load three vectors a cycle, but permute on the ports of FMAs, and split
// an FMA whose operand has an index in two.
bool loads_are_cheap();

}  // namespace fanin::conv
