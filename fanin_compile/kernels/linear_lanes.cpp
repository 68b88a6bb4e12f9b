// Many batch rows: lanes are batch rows. For each chunk of columns, x is transposed into L1 and every run of non-zeros of
// the plan adds value * x[column] to the lanes of its row: one weight is broadcast against contiguous vectors.
#include <utility>

#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

constexpr int kMaxVectors = kLanes >= 16 ? 2 : 4;             // vectors of one tile: 32 lanes fill L1 with a narrow chunk

template <class X>
const X* zeros() {
  alignas(64) static const X page[Plan::kWide] = {};
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

template <class I>
struct Columns4 {                                             // four columns by one load
  using Word = std::conditional_t<sizeof(I) == 1, uint32_t, uint64_t>;
  Word word;
  FANIN_INLINE explicit Columns4(const I* p) : word(load_raw<Word>(p)) {}
  template <int J>
  FANIN_INLINE int64_t at() const { return static_cast<I>(word >> (J * 8 * sizeof(I))); }
};
template <>
struct Columns4<int32_t> {
  const int32_t* p;
  FANIN_INLINE explicit Columns4(const int32_t* q) : p(q) {}
  template <int J>
  FANIN_INLINE int64_t at() const { return p[J]; }
};

// FMA latency times throughput asks for eight independent sums.
template <int T>
inline constexpr int kPhases = 8 / T;

template <int T>
struct Sums {
  vf v[kPhases<T>][T] = {};

  FANIN_INLINE void add(int phase, vf weight, const float* x) {
    for (int t = 0; t < T; ++t) v[phase][t] += weight * load_raw<vf>(x + t * kLanes);
  }
  template <class V, class I, int... J>
  FANIN_INLINE void add4(int phase, const V* values, const I* columns, const float* x, std::integer_sequence<int, J...>) {
    const Weights4 w(values);
    const Columns4<I> c(columns);
    (add((phase + J) % kPhases<T>, w.pick<J>(), x + c.template at<J>() * (T * kLanes)), ...);
  }
  FANIN_INLINE void into(float* y) const {
    for (int t = 0; t < T; ++t) {
      vf total = v[0][t];
      for (int p = 1; p < kPhases<T>; ++p) total += v[p][t];
      store_raw(y + t * kLanes, load_raw<vf>(y + t * kLanes) + total);
    }
  }
};

template <int T, class V, class I>
void run(const V* values, const I* columns, const Visit* visit, int64_t visits, const float* x, float* y) {
  using S4 = std::make_integer_sequence<int, 4>;
  for (const Visit* end = visit + visits; visit < end; ++visit) {
    const V* w = values + visit->start;
    const I* c = columns + visit->start;
    int left = visit->count;
    Sums<T> sums;
    for (; left >= 8; left -= 8, w += 8, c += 8) {
      sums.add4(0, w, c, x, S4{});
      sums.add4(4, w + 4, c + 4, x, S4{});
    }
    if (left >= 4) {
      sums.add4(0, w, c, x, S4{});
      w += 4, c += 4, left -= 4;
    }
    for (int j = 0; j < left; ++j) sums.add(0, splat(widen1(w + j)), x + int64_t{c[j]} * (T * kLanes));
    sums.into(y + visit->row * (T * kLanes));
  }
}

template <int T>
void tile(const Linear& op, int64_t lane, int64_t lanes, int64_t first, int64_t last) {
  constexpr int64_t stride = T * kLanes;
  const int64_t row0 = first * Plan::kBlockRows;
  const int64_t row1 = last * Plan::kBlockRows < op.n ? last * Plan::kBlockRows : op.n;
  const int64_t nnz = op.begin(op.n);
  const bool wide = T == 1 || nnz < 5 * op.n * Plan::chunks(op.in, Plan::kNarrow);
  const int64_t width = wide ? Plan::kWide : Plan::kNarrow;
  float* y = scratch((kTileRows + Plan::kWide) * kMaxVectors * kLanes);
  float* x = y + kTileRows * stride;
  __builtin_memset(y, 0, (row1 - row0) * stride * sizeof(float));
  for (int64_t chunk = 0; chunk < Plan::chunks(op.in, width); ++chunk) {
    const int64_t c0 = chunk * width, c1 = c0 + width < op.in ? c0 + width : op.in;
    with_dtype(op.x_type, [&](auto zero) { pack<decltype(zero)>(op, lane, lanes, T, c0, c1, x); });
    for (int64_t block = first; block < last; ++block) {
      const int64_t r = block * Plan::kBlockRows, rows = row1 - r < Plan::kBlockRows ? row1 - r : Plan::kBlockRows;
      const Visit* visits = Plan::visits(op.plan, op.n, op.in, wide, block, chunk);
      with_dtype(op.value_type, [&](auto v) {
        with_itype(op.index_type, [&](auto i) {
          run<T>(static_cast<const decltype(v)*>(op.values), static_cast<const decltype(i)*>(op.indices), visits, rows,
                 x - c0 * stride, y + (r - row0) * stride);
        });
      });
    }
  }
  finish_tile(op, lane, lanes, y, stride, row0, row1);
}

}  // namespace

int64_t max_lanes() { return kMaxVectors * kLanes; }

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
