// One batch row: every condensed row is a dot product with gathered inputs.
// Eight non-zeros a step: one vector load of values, eight scalar loads of x placed into a vector, one FMA.
#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

using v4 = Vec<float, 4>;                                     // whatever the ISA: the compiler splits or joins
using v8 = Vec<float, 8>;

FANIN_INLINE v8 concat(v4 a, v4 b) {
#if defined(__AVX__)
  return (v8)_mm256_set_m128((__m128)b, (__m128)a);           // the compiler adds two moves to the shuffle below
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
}

// Column J of the several that a word holds. Taken in ascending order, the last one is a shift in place.
template <class I, int J>
FANIN_INLINE uint64_t column(uint64_t word) {
  constexpr int kBits = 8 * sizeof(I), kShift = J * kBits;
  if constexpr (kShift + kBits == 64) return word >> kShift;
#if defined(__BMI__)
  uint64_t c = J == 0 ? static_cast<I>(word) : __builtin_ia32_bextr_u64(word, kBits << 8 | kShift);
  asm volatile("" : "+r"(c));                                 // keeps the order, and one instruction where it sees two
  return c;
#endif
  return static_cast<I>(word >> kShift);
}

struct Four {
  int64_t c[4];
};
template <class I, int J>
FANIN_INLINE Four columns4(uint64_t word) {
  Four f;
  f.c[0] = column<I, J>(word), f.c[1] = column<I, J + 1>(word), f.c[2] = column<I, J + 2>(word), f.c[3] = column<I, J + 3>(word);
  return f;
}

FANIN_INLINE v4 collect(const float* x, Four f) {
#if defined(__SSE2__)
  return (v4)_mm_movelh_ps(_mm_unpacklo_ps(_mm_load_ss(x + f.c[0]), _mm_load_ss(x + f.c[1])),
                           _mm_unpacklo_ps(_mm_load_ss(x + f.c[2]), _mm_load_ss(x + f.c[3])));
#else
  return v4{x[f.c[0]], x[f.c[1]], x[f.c[2]], x[f.c[3]]};
#endif
}

// x at eight columns, with as few column loads as possible: the load ports are the bound.
FANIN_INLINE v8 gather(const float* x, const uint16_t* p) {
  const uint64_t a = load_raw<uint64_t>(p), b = load_raw<uint64_t>(p + 4);
  const v4 low = collect(x, columns4<uint16_t, 0>(a)), high = collect(x, columns4<uint16_t, 0>(b));
  return concat(low, high);
}
FANIN_INLINE v8 gather(const float* x, const uint8_t* p) {
  const uint64_t a = load_raw<uint64_t>(p);
  const v4 low = collect(x, columns4<uint8_t, 0>(a)), high = collect(x, columns4<uint8_t, 4>(a));
  return concat(low, high);
}
FANIN_INLINE v8 gather(const float* x, const int32_t* p) {
  return concat(collect(x, {p[0], p[1], p[2], p[3]}), collect(x, {p[4], p[5], p[6], p[7]}));
}

FANIN_INLINE float sum(v8 a) {
  const v4 h = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  const v4 q = h + __builtin_shufflevector(h, h, 2, 3, 2, 3);
  return q[0] + q[1];
}

template <class V, class I>
FANIN_INLINE v8 dot(const V* w, const I* c, const float* x, int64_t count) {
  v8 acc{};
  for (int64_t j = 0; j < count; j += 8) acc += widen<8>(w + j) * gather(x, c + j);
  return acc;
}

// Eight products, those outside `used` dropped: whatever the arrays hold there, columns of a next row above all.
template <class V, class I>
FANIN_INLINE v8 masked(const V* w, const I* c, const float* x, Vec<int32_t, 8> used) {
  return keep<8>(used, widen<8>(w)) * keep<8>(used, gather(x, c));
}

template <class V, class I>
void rows(const Linear& op, const float* x, int64_t first, int64_t last, float* sums) {
  const V* values = static_cast<const V*>(op.values);
  const I* columns = static_cast<const I*>(op.indices);
  const Vec<int32_t, 8> lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const int64_t nnz = op.begin(op.n), k = op.k;
  int64_t r = first;
  if (const int64_t whole = k & -8; !op.row_ptr && k > 0 && nnz >= whole + 8) {
    // Constant fan-in: everything about the tail is known. Up to the last row after which eight elements can be read.
    const Vec<int32_t, 8> used = lane < static_cast<int32_t>(k - whole);
    const int64_t safe = (nnz - whole - 8) / k + 1;
    const V* w = values + r * k;
    const I* c = columns + r * k;
    for (const int64_t stop = last < safe ? last : safe; r < stop; ++r, w += k, c += k) {
      v8 acc = dot(w, c, x, whole);
      if (k > whole) acc += masked(w + whole, c + whole, x, used);
      sums[r - first] = sum(acc);
    }
  }
  for (; r < last; ++r) {
    const int64_t p = op.begin(r), count = op.begin(r + 1) - p, whole = count & -8;
    const V* w = values + p;
    const I* c = columns + p;
    v8 acc = dot(w, c, x, whole);
    if (p + whole + 8 <= nnz) {
      if (count > whole) acc += masked(w + whole, c + whole, x, lane < static_cast<int32_t>(count - whole));
    } else {
      for (int64_t j = whole; j < count; ++j) acc[j - whole] += widen1(w + j) * x[c[j]];
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
      with_itype(op.index_type, [&](auto i) { rows<decltype(v), decltype(i)>(op, xf, r, stop, sums); });
    });
    finish_row(op, b, sums, r, stop);
  }
}

}  // namespace fanin
