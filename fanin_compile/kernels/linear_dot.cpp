// One batch row: every condensed row is a dot product with gathered inputs.
// Eight non-zeros a step: one vector load of values, eight scalar loads of x placed into a vector, one FMA.
#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

constexpr int kStep = 8;                                      // whatever the ISA: the compiler splits or joins
using v8 = Vec<float, kStep>;
using m8 = Vec<int32_t, kStep>;

// Eight columns by as few loads as possible: the load ports are the bound.
FANIN_INLINE v8 gather(const float* x, const uint16_t* columns) {
  const uint64_t a = load_raw<uint64_t>(columns), b = load_raw<uint64_t>(columns + 4);
  return v8{x[a & 0xffff], x[a >> 16 & 0xffff], x[a >> 32 & 0xffff], x[a >> 48],
            x[b & 0xffff], x[b >> 16 & 0xffff], x[b >> 32 & 0xffff], x[b >> 48]};
}
FANIN_INLINE v8 gather(const float* x, const uint8_t* columns) {
  const uint64_t a = load_raw<uint64_t>(columns);
  return v8{x[a & 0xff],       x[a >> 8 & 0xff],  x[a >> 16 & 0xff], x[a >> 24 & 0xff],
            x[a >> 32 & 0xff], x[a >> 40 & 0xff], x[a >> 48 & 0xff], x[a >> 56]};
}
FANIN_INLINE v8 gather(const float* x, const int32_t* c) {
  return v8{x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]};
}

FANIN_INLINE float sum(v8 a) {
  const Vec<float, 4> h = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (h[0] + h[2]) + (h[1] + h[3]);
}

template <class V, class I>
void dot(const Linear& op, const float* x, int64_t first, int64_t last, float* sums) {
  const V* values = static_cast<const V*>(op.values);
  const I* columns = static_cast<const I*>(op.indices);
  const int64_t nnz = op.begin(op.n);
  for (int64_t r = first; r < last; ++r) {
    int64_t p = op.begin(r);
    const int64_t end = op.begin(r + 1);
    v8 acc{};
    for (; p + kStep <= end; p += kStep) acc += widen<kStep>(values + p) * gather(x, columns + p);
    if (const int64_t left = end - p; left > 0) {
      const m8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
      const m8 used = lane < static_cast<int32_t>(left);
      if (p + kStep <= nnz) {                                 // reads into the next row, masks what it finds there
        acc += keep<kStep>(used, widen<kStep>(values + p)) * keep<kStep>(used, gather(x, columns + p));
      } else {
        v8 w{}, g{};
        for (int64_t i = 0; i < left; ++i) {
          w[i] = widen1(values + p + i);
          g[i] = x[columns[p + i]];
        }
        acc += w * g;
      }
    }
    sums[r - first] = sum(acc);
  }
}

}  // namespace

void linear_dot(const Linear& op, int64_t b, const float* xf, int64_t first, int64_t last) {
  constexpr int64_t kRows = 256;
  alignas(64) float sums[kRows];
  for (int64_t r = first; r < last || r == first; r += kRows) {
    const int64_t stop = last - r < kRows ? last : r + kRows;
    with_dtype(op.value_type, [&](auto v) {
      with_itype(op.index_type, [&](auto i) { dot<decltype(v), decltype(i)>(op, xf, r, stop, sums); });
    });
    finish_row(op, b, sums, r, stop);
  }
}

}  // namespace fanin
