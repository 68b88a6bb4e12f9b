// Many batch rows: lanes are batch rows. For each chunk of columns, x is transposed into L1 and every run of non-zeros of
// the plan adds value * x[column] to the lanes of its row: one weight is broadcast against contiguous vectors.
#include <utility>

#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

constexpr int kMaxVectors = kLanes >= 16 ? 2 : 4;             // 32 lanes with 8 sums fill 16 registers
constexpr int64_t kWidest = Plan::width(Plan::kLevels - 1);

template <class X>
const X* zeros() {
  alignas(64) static const X page[kWidest] = {};
  return page;
}

// x[lane : lane + lanes, c0 : c1] -> out[c1 - c0][vectors * kLanes], zero beyond lanes
template <class X>
void pack(const Linear& op, int64_t lane, int64_t lanes, int vectors, int64_t c0, int64_t c1, float* out) {
  const int64_t stride = vectors * kLanes;
  for (int64_t g = 0; g < stride; g += kLanes) {
    const X* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      rows[i] = g + i < lanes ? static_cast<const X*>(op.x) + (lane + g + i) * op.x_stride + c0 : zeros<X>();
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

// Four columns by one load, as places in packed x.
template <class I, int kStride>
struct Columns4 {
  using Word = std::conditional_t<sizeof(I) == 1, uint32_t, uint64_t>;
  static constexpr int kBits = 8 * sizeof(I), kWordBits = 8 * sizeof(Word), kScale = __builtin_ctz(kStride * sizeof(float));
  static constexpr bool kRotates = (kStride & (kStride - 1)) == 0 && kBits + kScale <= kWordBits;
  Word word;
  FANIN_INLINE explicit Columns4(const I* p) : word(load_raw<Word>(p)) {}
  template <int J>
  FANIN_INLINE const float* in(const float* x) const {
    if constexpr (kRotates) {                                 // extract and scale in two instructions
      constexpr int kTurn = (kScale + kWordBits - J * kBits) % kWordBits;
      constexpr Word kMask = ((Word{1} << kBits) - 1) << kScale;
      const Word offset = (word << kTurn | word >> (kWordBits - kTurn)) & kMask;
      return reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + offset);
    }
    return x + static_cast<int64_t>(static_cast<I>(word >> (J * kBits))) * kStride;
  }
};
template <int kStride>
struct Columns4<int32_t, kStride> {
  const int32_t* p;
  FANIN_INLINE explicit Columns4(const int32_t* q) : p(q) {}
  template <int J>
  FANIN_INLINE const float* in(const float* x) const { return x + int64_t{p[J]} * kStride; }
};

// T vectors of lanes of one row, each as P independent sums: FMA latency times throughput is 8.
template <int T>
struct Sums {
  static constexpr int kStride = T * kLanes, P = T == 1 ? 4 : 8 / T;
  vf v[P][T];

  FANIN_INLINE explicit Sums(const float* y) : v{} {
    for (int t = 0; t < T; ++t) v[0][t] = load_raw<vf>(y + t * kLanes);
  }
  FANIN_INLINE void add(int p, vf weight, const float* x) {
    for (int t = 0; t < T; ++t) v[p][t] += weight * load_raw<vf>(x + t * kLanes);
  }
  template <class V, class I>
  FANIN_INLINE void add1(int p, const V* value, const I* column, const float* x) {
    add(p, splat(widen1(value)), x + int64_t{*column} * kStride);
  }
  template <class V, class I>
  FANIN_INLINE void add4(const V* values, const I* columns, const float* x) {
    const Weights4 weight(values);
    const Columns4<I, kStride> column(columns);
    add(0, weight.template pick<0>(), column.template in<0>(x));
    add(1 % P, weight.template pick<1>(), column.template in<1>(x));
    add(2 % P, weight.template pick<2>(), column.template in<2>(x));
    add(3 % P, weight.template pick<3>(), column.template in<3>(x));
  }
  FANIN_INLINE void store(float* y) {
    for (int t = 0; t < T; ++t) {
      for (int p = 1; p < P; ++p) v[0][t] += v[p][t];
      store_raw(y + t * kLanes, v[0][t]);
    }
  }
};

// Adds each visit's products to its row of y[row][T * kLanes]. x is biased: column c is at x + c * T * kLanes.
template <int T, class V, class I>
void run(const V* values, const I* columns, const Visit* visit, int64_t visits, const float* x, float* y) {
  constexpr int kStride = Sums<T>::kStride, P = Sums<T>::P;
  for (const Visit* end = visit + visits; visit < end; ++visit) {
    // Runs are short (a cache line or two) and in the order of counts, which hardware prefetchers do not follow.
    const Visit& ahead = visit[Plan::kAhead];
    __builtin_prefetch(values + ahead.start);
    __builtin_prefetch(columns + ahead.start);
    for (int t = 0; t < kStride; t += 16) __builtin_prefetch(y + ahead.row * kStride + t, 1);

    const V* w = values + visit->start;
    const I* c = columns + visit->start;
    int left = visit->count;
    float* out = y + visit->row * kStride;
    Sums<T> sums(out);
    for (; left >= 12; left -= 12, w += 12, c += 12) {
      sums.add4(w, c, x);
      sums.add4(w + 4, c + 4, x);
      sums.add4(w + 8, c + 8, x);
    }
    for (; left >= 4; left -= 4, w += 4, c += 4) sums.add4(w, c, x);
    if (left & 2) {                                           // not a loop: sums stay in registers
      sums.add1(0, w, c, x);
      sums.add1(1 % P, w + 1, c + 1, x);
      w += 2, c += 2;
    }
    if (left & 1) sums.add1(P - 1, w, c, x);
    sums.store(out);
  }
}

// The level whose chunk of x fits L1 at so many lanes, or a higher one where its visits would be too short to pay.
int level_for(const Linear& op, int64_t lanes) {
  constexpr int64_t kWorthwhile = 5;                          // non-zeros of an average visit
  const int64_t nnz = op.begin(op.n);
  int level = lanes > 16 ? 0 : lanes > 8 ? 1 : 2;
  while (level + 1 < Plan::kLevels && nnz < kWorthwhile * op.n * Plan::chunks(op.in, level)) ++level;
  return level;
}

template <int T>
void tile(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last) {
  constexpr int64_t kStride = T * kLanes;
  const int64_t row0 = Plan::first_row(op.n, first), row1 = Plan::first_row(op.n, last);
  const int level = level_for(op, kStride);
  const int64_t width = Plan::width(level);
  float* y = scratch((kTileRows + kWidest) * kMaxVectors * kLanes);
  float* x = y + kTileRows * kStride;
  __builtin_memset(y, 0, (row1 - row0) * kStride * sizeof(float));
  for (int64_t chunk = 0; chunk < Plan::chunks(op.in, level); ++chunk) {
    const int64_t c0 = chunk * width, c1 = c0 + width < op.in ? c0 + width : op.in;
    with_dtype(op.x_type, [&](auto zero) { pack<decltype(zero)>(op, lane, lanes, T, c0, c1, x); });
    for (int64_t block = first; block < last; ++block) {
      const int64_t r = Plan::first_row(op.n, block), rows = Plan::first_row(op.n, block + 1) - r;
      const Visit* visits = Plan::visits(op.plan, op.n, op.in, level, block, chunk);
      with_dtype(op.value_type, [&](auto v) {
        with_itype(op.index_type, [&](auto i) {
          run<T>(static_cast<const decltype(v)*>(op.values), static_cast<const decltype(i)*>(op.indices), visits, rows,
                 x - c0 * kStride, y + (r - row0) * kStride);
        });
      });
    }
  }
  finish_tile(op, lane, lanes, y, kStride, row0, row1);
}

}  // namespace

int64_t vector_lanes() { return kLanes; }
int64_t max_vectors() { return kMaxVectors; }

void linear_lanes(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last) {
  const int64_t vectors = (lanes + kLanes - 1) / kLanes;
  if (vectors == 1) return tile<1>(op, lane, lanes, first, last);
  if (vectors == 2) return tile<2>(op, lane, lanes, first, last);
  if constexpr (kMaxVectors == 4) {
    if (vectors == 3) return tile<3>(op, lane, lanes, first, last);
    return tile<4>(op, lane, lanes, first, last);
  }
}

}  // namespace fanin
