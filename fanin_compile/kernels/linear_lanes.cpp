// Many batch rows: lanes are batch rows. x is transposed to [column][lanes], and every group of four rows adds
// value * x[column] to its sums: one weight is broadcast against contiguous vectors.
#include <algorithm>

#include "dispatch.h"
#include "linear.h"
#include "linear_stream.h"
#include "vec.h"

namespace fanin {
namespace {

constexpr int kMaxVectors = 3;                                // 12 sums of 4 rows, 4 weights and one of them spread: 14 registers

// x[lane : lane + lanes, c0 : c1] -> out[c1 - c0][vectors * kLanes]; lanes beyond repeat the first, nobody reads their sums.
template <class X>
void pack(const Linear& op, int64_t lane, int64_t lanes, int vectors, int64_t c0, int64_t c1, float* out) {
  const int64_t stride = vectors * kLanes;
  for (int64_t g = 0; g < stride; g += kLanes) {
    const X* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      rows[i] = static_cast<const X*>(op.x) + (lane + (g + i < lanes ? g + i : 0)) * op.x_stride + c0;
    int64_t c = 0;
    for (; c + kPiece <= c1 - c0; c += kPiece) {
      constexpr int64_t kLine = 64 / sizeof(X);               // so many rows at once are too many streams for the hardware
      if (c % kLine == 0)
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(rows[i] + c + 2 * kLine);
      vf v[kPiece];
      for (int i = 0; i < kPiece; ++i)
        v[i] = gather_pieces<kLanes>(0, [&](int b) { return widen<kPiece>(rows[b * kPiece + i] + c); });
      transpose_pieces(v);
      for (int i = 0; i < kPiece; ++i) store_raw(out + (c + i) * stride + g, v[i]);
    }
    for (; c < c1 - c0; ++c)
      for (int64_t i = 0; i < kLanes; ++i) out[c * stride + g + i] = widen1(rows[i] + c);
  }
}

// Eight columns by as few loads as possible, as places in packed x.
template <class C, int kStride>
struct Columns8 {
  static constexpr int kBits = 8 * sizeof(C), kWords = sizeof(C), kEach = 8 / kWords;
  static constexpr int kBytes = kStride * sizeof(float), kOdd = kBytes / (kBytes & -kBytes), kScale = __builtin_ctz(kBytes);
  uint64_t word[kWords];

  FANIN_INLINE explicit Columns8(const C* p) {
    for (int i = 0; i < kWords; ++i) word[i] = early<uint64_t>(p + i * kEach);
  }
  template <int J>
  FANIN_INLINE const float* in(const float* x) const {        // extract and scale in two instructions, three for odd kStride
    constexpr int kTurn = (kScale + 64 - J % kEach * kBits) % 64;
    constexpr uint64_t kMask = ((uint64_t{1} << kBits) - 1) << kScale;
    const uint64_t w = word[J / kEach], offset = (w << kTurn | w >> ((64 - kTurn) % 64)) & kMask;
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + offset * kOdd);
  }
};

// Adds the products of each group to the sums of its rows, y[row][T * kLanes]. last: the last eight columns of the weight.
template <int T, class V, class C>
__attribute__((noinline)) void run(const V* w, const C* c, const C* last, const Group* group, int64_t groups, const float* x,
                                   float* y) {
  constexpr int kStride = T * kLanes;
  if (groups == 0) return;
  Columns8<C, kStride> next(c);
  for (const Group* end = group + groups; group < end; ++group) {
    float* rows[4];
    vf sums[4][T];
    for (int r = 0; r < 4; ++r) {
      rows[r] = y + group->row[r] * kStride;
      for (int t = 0; t < T; ++t) sums[r][t] = load_raw<vf>(rows[r] + t * kLanes);
    }
    const auto add = [&](int r, vf weight, const float* p) {
      for (int t = 0; t < T; ++t) sums[r][t] += weight * load_raw<vf>(p + t * kLanes);
    };
    const V* stop = w + 8 * int64_t{group->pairs};
    if constexpr (T == 1) request_ahead(w, c, stop - w);
    do {
      const Columns8<C, kStride> column = next;
      c += 8;
      next = Columns8<C, kStride>(std::min(c, last));
      const Weights4 a(w);
      add(0, a.template pick<0>(), column.template in<0>(x));
      add(1, a.template pick<1>(), column.template in<1>(x));
      add(2, a.template pick<2>(), column.template in<2>(x));
      add(3, a.template pick<3>(), column.template in<3>(x));
      const Weights4 b(w + 4);
      add(0, b.template pick<0>(), column.template in<4>(x));
      add(1, b.template pick<1>(), column.template in<5>(x));
      add(2, b.template pick<2>(), column.template in<6>(x));
      add(3, b.template pick<3>(), column.template in<7>(x));
      w += 8;
    } while (w < stop);
    for (int r = 0; r < 4; ++r)
      for (int t = 0; t < T; ++t) store_raw(rows[r] + t * kLanes, sums[r][t]);
  }
}

template <int T>
void run_block(const Linear& op, int64_t block, int64_t chunk0, int64_t chunk1, const float* x, float* y) {
  const Structure& w = *op.weight;
  for (int64_t chunk = chunk0; chunk < chunk1; ++chunk, x += (w.width + 1) * T * kLanes) {
    const Segment* s = w.segments() + block * w.chunks + chunk;
    const Group* groups = w.groups() + s->group;
    const int64_t count = s[1].group - s->group;
    with_dtype(op.value_type, [&](auto v) {
      const auto* values = static_cast<const decltype(v)*>(op.values) + s->entry;
      const auto from = [&](const auto* columns) {
        run<T>(values, columns + s->entry, columns + w.entries - 8, groups, count, x, y);
      };
      if (w.column_bytes == 1) from(w.columns());
      else from(reinterpret_cast<const uint16_t*>(w.columns()));
    });
  }
}

}  // namespace

int64_t vector_lanes() { return kLanes; }
int64_t max_vectors() { return kMaxVectors; }

void pack_tile(const Linear& op, int64_t lane, int64_t lanes, int64_t chunk0, int64_t chunk1, float* x) {
  const Structure& w = *op.weight;
  const int64_t stride = stride_of(lanes);
  for (int64_t chunk = chunk0; chunk < chunk1; ++chunk, x += (w.width + 1) * stride) {
    const int64_t c0 = chunk * w.width, c1 = c0 + w.width < w.in ? c0 + w.width : w.in;
    with_dtype(op.x_type, [&](auto zero) { pack<decltype(zero)>(op, lane, lanes, stride / kLanes, c0, c1, x); });
    __builtin_memset(x + w.width * stride, 0, stride * sizeof(float));
  }
}

void run_tile(const Linear& op, int64_t lanes, int64_t block, int64_t chunk0, int64_t chunk1, const float* x, float* y) {
  const int64_t vectors = stride_of(lanes) / kLanes;
  if (vectors == 1) return run_block<1>(op, block, chunk0, chunk1, x, y);
  if (vectors == 2) return run_block<2>(op, block, chunk0, chunk1, x, y);
  return run_block<3>(op, block, chunk0, chunk1, x, y);
}

void linear_lanes(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last) {
  const Structure& w = *op.weight;
  const int64_t stride = stride_of(lanes), chunk_floats = (w.width + 1) * stride;
  const int64_t most = window_bytes() / (chunk_floats * static_cast<int64_t>(sizeof(float)));
  const int64_t windows = most >= w.chunks ? 1 : most == 0 ? w.chunks : (w.chunks + most - 1) / most;
  const int64_t step = (w.chunks + windows - 1) / windows;
  // Between windows all sums are kept, otherwise those of a block.
  const int64_t row0 = w.first_row(first), spare = w.tallest() + 1;
  float* x = scratch(step * chunk_floats);
  float* sums = scratch((windows == 1 ? spare : w.first_row(last) - row0 + spare) * stride, 1);
  for (int64_t chunk0 = 0; chunk0 < w.chunks; chunk0 += step) {
    const int64_t chunk1 = chunk0 + step < w.chunks ? chunk0 + step : w.chunks;
    pack_tile(op, lane, lanes, chunk0, chunk1, x);
    for (int64_t block = first; block < last; ++block) {
      const int64_t r0 = w.first_row(block), r1 = w.first_row(block + 1);
      float* y = windows == 1 ? sums : sums + (r0 - row0) * stride;
      if (chunk0 == 0) __builtin_memset(y, 0, (r1 - r0) * stride * sizeof(float));
      run_tile(op, lanes, block, chunk0, chunk1, x, y);
      if (chunk1 == w.chunks) finish_tile(op, lane, lanes, y, r0, r1);
    }
  }
}

}  // namespace fanin
