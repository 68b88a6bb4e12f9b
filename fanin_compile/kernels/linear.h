// Interface of the linear kernels: plain data, no torch headers. Layouts and derivations: README.md.
#pragma once

#include <cstdint>

namespace fanin {

enum class DType : int32_t { f32, bf16, f16 };
enum class Act : int32_t { none, relu, relu6, gelu, gelu_tanh, silu, hardswish, sigmoid, tanh };

// Four rows of one block, of about equal count in one chunk of columns: 2 * pairs steps, each of one non-zero of every row.
struct Group {
  uint16_t row[4];              // inside the block; one past its last row where there is no fourth
  uint16_t pairs;
};

// Where a (block of rows, chunk of columns) begins among the groups and among the entries.
struct Segment {
  int32_t group, entry;
};

// The structure of a packed weight, as packing.py writes it: this header, then three arrays at the offsets it names.
struct Structure {
  static constexpr int64_t kVersion = 0x0fa10003;
  int64_t version, bytes;       // bytes of all of it
  int64_t out, in, nnz;
  int64_t width, column_bytes;  // columns of a chunk, and the size of a column's number inside it
  int64_t blocks, chunks;       // block b is rows [out * b / blocks, out * (b + 1) / blocks)
  int64_t entries;              // of columns and values, those that fill up groups included
  int64_t segments_at, groups_at, columns_at;
  int64_t tile;                 // vectors of lanes of a tile, at most
  int64_t unused[2];

  int64_t first_row(int64_t block) const { return out * block / blocks; }
  int64_t tallest() const { return (out + blocks - 1) / blocks; }
  template <class T>
  const T* at(int64_t offset) const { return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset); }
  // [blocks * chunks + 1], [groups], [entries]
  const Segment* segments() const { return at<Segment>(segments_at); }
  const Group* groups() const { return at<Group>(groups_at); }
  const uint8_t* columns() const { return at<uint8_t>(columns_at); }
};

// y[b, o] = act(sum_c W[o, c] * x[b, c] + bias[o] + residual[b, o])
struct Linear {
  const Structure* weight;
  const void* values;           // [weight->entries]
  const void* x;                // [batch, in], rows x_stride elements apart
  const void* bias;             // [out] or null
  const void* residual;         // [batch, out] contiguous, of x's type, or null
  const float* norm;            // of x's rows, as norm.py packs it: weight [in], eps, bias [in], whether the mean is taken; or null
  void* y;                      // [batch, out] contiguous, of x's type; every element is written
  int64_t batch, x_stride;
  DType x_type, value_type, bias_type;
  Act act;
};

// Two layers, the second reading the first's outputs: h = act(z), or act(z[:n]) * z[n:] if gated. first.y is not used.
struct Chain {
  Linear first, second;
  bool gated;
};

// A tile is up to kMaxVectors vectors of consecutive batch rows, its lanes, computed together. This is what is done with one in
// vectors of one width; packed x, sums and h have stride_of(count) floats for each column or row.
struct Tiling {
  int64_t lanes;                // of a vector
  // x of batch rows [lane, lane + count), chunks [chunk0, chunk1), into packed x
  void (*pack)(const Linear& op, int64_t lane, int64_t count, int64_t chunk0, int64_t chunk1, float* x);
  // sums of one block, added to what y holds (one row more than the block's, which fills up groups); the first chunk is at x
  void (*run)(const Linear& op, int64_t count, int64_t block, int64_t chunk0, int64_t chunk1, const float* x, float* y);
  // one vector of lanes of `rows` rows of sums, each lane into a row of its own, `step` floats apart
  void (*turn)(const float* sums, int64_t stride, int64_t rows, int64_t step, float* turned);
  // h[row] = act(sums[row] + bias[row]), or times it
  void (*hidden)(Act act, const float* sums, const float* bias, int64_t rows, int64_t stride, bool times, float* h);

  int64_t stride_of(int64_t count) const { return (count + lanes - 1) / lanes * lanes; }
};
inline constexpr int64_t kMaxVectors = 3;                     // 12 sums of 4 rows, 4 weights and one of them spread: 14 registers
const Tiling& whole_tiling();
const Tiling* half_tiling();                                  // null where half vectors gain nothing
// Of the narrowest vectors one of which holds so many batch rows.
const Tiling& tiling_for(int64_t batch);
inline constexpr int64_t kTileRows = 3072;                    // rows whose sums a thread keeps, if in is too wide for one pass
// Bytes of a core's second-level cache, as the system tells; 512 KiB where it does not.
int64_t l2_bytes();
inline int64_t window_bytes() { return l2_bytes() / 16 * 11; }  // of x packed at a time

// Packed x, one chunk after another: [width] columns and one of zeros, of one batch row or of the lanes of a tile.
inline int64_t slots(const Structure& w) { return w.chunks * (w.width + 1); }
inline int64_t slot(const Structure& w, int64_t column) { return column + column / w.width; }

// Of one batch row, for a layer with a norm.
struct Moments {
  float mean, scale;            // 1 / deviation
};
Moments moments(const Linear& op, int64_t b);

// Batch row b, blocks [first, last); x is packed.
void pack_row(const Linear& op, int64_t b, float* x);
void linear_dot(const Linear& op, int64_t b, const float* x, int64_t first, int64_t last);
// Batch rows [lane, lane + lanes), at most one tile, blocks [first, last).
void linear_lanes(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last);

// Both halves of a chain, for blocks [first, last) of their layer; h is packed for the second, its columns of zeros set
// beforehand by chain_gaps. Of one batch row ...
void chain_gaps(const Chain& chain, int64_t stride, float* h);
void chain_hidden(const Chain& chain, const float* x, int64_t first, int64_t last, float* h);
void chain_output(const Chain& chain, const float* h, int64_t first, int64_t last);
// ... or of a tile.
void chain_hidden(const Chain& chain, int64_t lane, int64_t lanes, int64_t first, int64_t last, float* h);
void chain_output(const Chain& chain, int64_t lane, int64_t lanes, int64_t first, int64_t last, const float* h);

// The sums of one block and one batch row, added to what y holds, as Tiling::run does.
void run_row(const Linear& op, int64_t block, const float* x, float* y);

// Epilogues of rows [first, last): add bias and residual, activate, convert and store.
void finish_row(const Linear& op, int64_t b, const float* sums, int64_t first, int64_t last);
void finish_tile(const Linear& op, int64_t lane, int64_t lanes, const float* sums, int64_t first, int64_t last);
// The same into packed h; lanes = 0 means one batch row.
void finish_hidden(const Chain& chain, int64_t lanes, const float* sums, int64_t first, int64_t last, float* h);

// x[0:count] of any type to fp32.
void widen_row(const void* x, DType type, int64_t count, float* out);

// Scratch of this thread, kept between calls; 64-byte aligned. Three buffers, for what is needed at the same time.
float* scratch(int64_t floats, int buffer = 0);
// Most bytes that one thread has held since the library was loaded.
int64_t scratch_nbytes();

}  // namespace fanin
