// Interface of the linear kernels: plain data, no torch headers. Layouts and derivations: README.md.
#pragma once

#include <cstdint>

namespace fanin {

enum class DType : int32_t { f32, bf16, f16 };
enum class IType : int32_t { u8, u16, i32 };
enum class Act : int32_t { none, relu, gelu, gelu_tanh, silu, hardswish, sigmoid, tanh };

// y[b, rows[r]] = act(sum_j values[r, j] * x[b, indices[r, j]] + bias[rows[r]] + residual[b, rows[r]]);
// outputs that no row names get act(bias + residual).
struct Linear {
  const void* x;                // [batch, in], rows x_stride elements apart
  const void* values;           // [n, k], or [nnz] with row_ptr
  const void* indices;          // as values; ascending in each row
  const int32_t* row_ptr;       // [n + 1], or null: row r is [r * k, (r + 1) * k)
  const int32_t* rows;          // [n] strictly ascending, or null: identity and n == out
  const void* bias;             // [out] or null
  const void* residual;         // [batch, out] contiguous, of x's type, or null
  const int32_t* plan;          // lanes kernel only
  void* y;                      // [batch, out] contiguous, of x's type; every element is written
  int64_t batch, in, out, n, k, x_stride;
  DType x_type, value_type, bias_type;
  IType index_type;
  Act act;

  int64_t begin(int64_t r) const { return row_ptr ? row_ptr[r] : r * k; }
  // The outputs that condensed rows [first, last) are to write, ablated ones between and around them included:
  int64_t out_begin(int64_t first) const { return first == 0 ? 0 : rows ? rows[first] : first; }
  int64_t out_end(int64_t last) const { return last >= n ? out : rows ? rows[last] : last; }
};

// One run of non-zeros of one row inside one chunk of columns.
struct Visit {
  int32_t start;                // position in values and indices
  uint16_t row;                 // row inside its block
  uint16_t count;
};

// The plan: which runs to visit, chunk by chunk, rows of equal count side by side. An int32 array whose size depends on
// (n, in) only: a header, then for each level [block of rows][chunk of columns][row of the block] visits.
struct Plan {
  static constexpr int32_t kVersion = 0x0fa10002;
  static constexpr int64_t kHeader = 8;
  static constexpr int64_t kAhead = 3;         // visits to prefetch ahead, readable past the end of a level
  static constexpr int kLevels = 3;
  // Columns of a chunk: 28 KiB of x at 32, 16 and 8 lanes, a wider one where a chunk holds few non-zeros.
  static constexpr int64_t width(int level) { return int64_t{224} << level; }

  static constexpr int64_t chunks(int64_t in, int level) { return (in + width(level) - 1) / width(level); }
  // A power of two, so that threads can share it evenly, of blocks of at least 384 rows: a longer run of visits with equal
  // count mispredicts less often.
  static constexpr int64_t blocks(int64_t n) {
    int64_t count = 1;
    while (n >= 2 * count * 384) count *= 2;
    return count;
  }
  static constexpr int64_t first_row(int64_t n, int64_t block) { return n * block / blocks(n); }

  static constexpr int64_t level_visits(int64_t n, int64_t in, int level) { return n * chunks(in, level) + kAhead; }
  static constexpr int64_t size(int64_t n, int64_t in) {
    int64_t visits = 0;
    for (int level = 0; level < kLevels; ++level) visits += level_visits(n, in, level);
    return kHeader + 2 * visits;
  }
  // Visits of the rows of `block` in `chunk`: as many as the block has rows.
  static const Visit* visits(const int32_t* plan, int64_t n, int64_t in, int level, int64_t block, int64_t chunk) {
    const int64_t first = first_row(n, block), rows = first_row(n, block + 1) - first;
    int64_t skip = first * chunks(in, level) + chunk * rows;
    for (int lower = 0; lower < level; ++lower) skip += level_visits(n, in, lower);
    return reinterpret_cast<const Visit*>(plan + kHeader) + skip;
  }
};

// Fills plan[Plan::size(n, in)]. False if a column is outside [0, in) or the rows are not ascending enough to be cut into chunks.
bool build_plan(int32_t* plan, const void* indices, IType type, const int32_t* row_ptr, int64_t n, int64_t k, int64_t in);
// Whether plan was built for this very structure size by this version.
bool plan_fits(const int32_t* plan, int64_t n, int64_t in, int64_t nnz);

// Whether the last column of every row, the largest of ascending ones, is below in: what a call without a plan can check.
bool columns_below(const void* indices, IType type, const int32_t* row_ptr, int64_t n, int64_t k, int64_t in);

// A tile is up to max_vectors() vectors of vector_lanes() consecutive batch rows, computed together over up to kTileRows
// condensed rows.
int64_t vector_lanes();
int64_t max_vectors();
inline constexpr int64_t kTileRows = 768;

// Batch row b, condensed rows [first, last); xf is x's row b in fp32.
void linear_dot(const Linear& op, int64_t b, const float* xf, int64_t first, int64_t last);
// Batch rows [lane, lane + lanes), at most one tile, the condensed rows of blocks [first, last) of the plan, at most kTileRows.
void linear_lanes(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last);

// Epilogues: add bias and residual, activate, convert and store.
void finish_row(const Linear& op, int64_t b, const float* sums, int64_t first, int64_t last);
void finish_tile(const Linear& op, int64_t lane, int64_t lanes, const float* sums, int64_t stride, int64_t first, int64_t last);

// x[0:in] of any type to fp32.
void widen_row(const void* x, DType type, int64_t count, float* out);

// Scratch of this thread, kept between calls; 64-byte aligned.
float* scratch(int64_t floats);

}  // namespace fanin
