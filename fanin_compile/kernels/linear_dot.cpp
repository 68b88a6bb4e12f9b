// One batch row: four rows at a time are dot products with gathered inputs.
// Eight non-zeros at once: one vector load of values, eight scalar loads of x placed into a vector, one FMA. Where registers
// can be looked up (linear_lookup.h), 16 at once from inputs found before.
#include <algorithm>

#include "dispatch.h"
#include "linear.h"
#include "linear_lookup.h"
#include "linear_stream.h"
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

// Adds to the sums of each group's rows. Lanes hold two steps of four rows each.
template <class V, class C>
__attribute__((noinline)) void run(  // inlined, its loop is short of registers: 87 instead of 63 us
    const V* w, const C* c, const Group* group, int64_t groups, const float* x, float* sums) {
  for (const Group* end = group + groups; group < end; ++group) {
    v8 acc{};
    const V* stop = w + 8 * int64_t{group->pairs};
    request_ahead(w, c, stop - w);
    do {
      acc += widen<8>(w) * gather(x, c);
      w += 8, c += 8;
    } while (w < stop);
    const v4 sum = __builtin_shufflevector(acc, acc, 0, 1, 2, 3) + __builtin_shufflevector(acc, acc, 4, 5, 6, 7);
    for (int r = 0; r < 4; ++r) sums[group->row[r]] += sum[r];
  }
}

#if defined(FANIN_LOOKUP)
constexpr int64_t kFound = 512;                 // entries whose x is looked up before it is used

// The same, x looked up beforehand for several groups: as many as make kFound entries.
template <class V>
__attribute__((noinline)) void run(const V* w, const uint8_t* c, const Group* group, int64_t groups, const float* x, int64_t width,
                                   float* sums) {
  using v16 = Vec<float, 16>;
  alignas(64) float found[kFound + 8 * 128 + Lookup::kStep];
  const Lookup lookup(x, width + 1);
  for (const Group* end = group + groups; group < end;) {
    int64_t entries = 0;
    const Group* stop = group;
    while (stop < end && entries < kFound) entries += 8 * int64_t{stop++->pairs};
    request_ahead(w, c, entries);
    lookup(c, entries, found);
    c += entries;
    for (const float* p = found; group < stop; ++group) {
      const V* last = w + 8 * int64_t{group->pairs};
      v16 acc{};
      for (; last - w >= 16; w += 16, p += 16) acc += widen<16>(w) * load_raw<v16>(p);
      v8 half = __builtin_shufflevector(acc, acc, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(acc, acc, 8, 9, 10, 11, 12, 13, 14, 15);
      if (w < last) half += widen<8>(w) * load_raw<v8>(p), w += 8, p += 8;
      const v4 sum = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
      for (int r = 0; r < 4; ++r) sums[group->row[r]] += sum[r];
    }
  }
}
#endif

}  // namespace

void pack_row(const Linear& op, int64_t b, float* out) {
  const Structure& w = *op.weight;
  const int64_t size = op.x_type == DType::f32 ? 4 : 2;
  const char* x = static_cast<const char*>(op.x) + b * op.x_stride * size;
  const Moments row = op.norm ? moments(op, b) : Moments{};
  for (int64_t c = 0; c < w.chunks * w.width; c += w.width, out += w.width + 1) {
    const int64_t count = std::clamp<int64_t>(w.in - c, 0, w.width);
    widen_row(x + c * size, op.x_type, count, out);
    if (op.norm) {
      const float *weight = op.norm + c, *bias = weight + w.in + 1;
      for (int64_t i = 0; i < count; ++i) out[i] = (out[i] - row.mean) * row.scale * weight[i] + bias[i];
    }
    out[w.width] = 0;
  }
}

void run_row(const Linear& op, int64_t block, const float* x, float* y) {
  const Structure& w = *op.weight;
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk, x += w.width + 1) {
    const Segment* s = w.segments() + block * w.chunks + chunk;
    const Group* groups = w.groups() + s->group;
    const int64_t count = s[1].group - s->group;
    with_dtype(op.value_type, [&](auto v) {
      const auto* values = static_cast<const decltype(v)*>(op.values) + s->entry;
#if defined(FANIN_LOOKUP)
      if (w.column_bytes == 1) run(values, w.columns() + s->entry, groups, count, x, w.width, y);
#else
      if (w.column_bytes == 1) run(values, w.columns() + s->entry, groups, count, x, y);
#endif
      else run(values, reinterpret_cast<const uint16_t*>(w.columns()) + s->entry, groups, count, x, y);
    });
  }
}

void linear_dot(const Linear& op, int64_t b, const float* x, int64_t first, int64_t last) {
  const Structure& w = *op.weight;
  float* sums = scratch(w.tallest() + 1, 1);
  for (int64_t block = first; block < last; ++block) {
    __builtin_memset(sums, 0, (w.tallest() + 1) * sizeof(float));
    run_row(op, block, x, sums);
    finish_row(op, b, sums, w.first_row(block), w.first_row(block + 1));
  }
}

}  // namespace fanin
