// Tiles: lanes are batch rows. x is transposed to [column][lanes], and every group of four rows adds value * x[column] to its
// sums: one weight is broadcast against contiguous vectors.
#include <algorithm>

#include "activation.h"
#include "dispatch.h"
#include "linear.h"
#include "linear_stream.h"
#include "vec.h"

namespace fanin {
namespace {

// x[lane : lane + lanes, c0 : c1] -> out[c1 - c0][vectors * kLanes], normalised by `moments` of the lanes if the layer has a norm;
// lanes beyond repeat the first, nobody reads their sums.
template <bool kNorm, class X>
void pack(const Linear& op, const Moments* moments, int64_t lane, int64_t lanes, int vectors, int64_t c0, int64_t c1, float* out) {
  const int64_t stride = vectors * kLanes;
  const float *weight = kNorm ? op.norm + c0 : nullptr, *bias = kNorm ? weight + op.weight->in + 1 : nullptr;
  for (int64_t g = 0; g < stride; g += kLanes) {
    vf mean, scale;
    if constexpr (kNorm)
      for (int i = 0; i < kLanes; ++i) mean[i] = moments[g + i].mean, scale[i] = moments[g + i].scale;
    const auto normalised = [&](vf v, int64_t c) {
      if constexpr (kNorm) return (v - mean) * scale * splat(weight[c]) + splat(bias[c]);
      return v;
    };
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
      for (int i = 0; i < kPiece; ++i) store_raw(out + (c + i) * stride + g, normalised(v[i], c + i));
    }
    for (; c < c1 - c0; ++c) {
      vf v;
      for (int i = 0; i < kLanes; ++i) v[i] = widen1(rows[i] + c);
      store_raw(out + c * stride + g, normalised(v, c));
    }
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
    do {
      if constexpr (T == 1) request_page(w, c);               // more work on an entry hides the wait, and this only costs
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

void pack_tile(const Linear& op, int64_t lane, int64_t count, int64_t chunk0, int64_t chunk1, float* x) {
  const Structure& w = *op.weight;
  const int64_t vectors = (count + kLanes - 1) / kLanes, stride = vectors * kLanes;
  Moments rows[kMaxVectors * kLanes];
  if (op.norm)
    for (int64_t i = 0; i < stride; ++i) rows[i] = i < count ? moments(op, lane + i) : rows[0];
  for (int64_t chunk = chunk0; chunk < chunk1; ++chunk, x += (w.width + 1) * stride) {
    const int64_t c0 = chunk * w.width, c1 = c0 + w.width < w.in ? c0 + w.width : w.in;
    with_dtype(op.x_type, [&](auto zero) {
      using X = decltype(zero);
      if (op.norm) pack<true, X>(op, rows, lane, count, vectors, c0, c1, x);
      else pack<false, X>(op, rows, lane, count, vectors, c0, c1, x);
    });
    __builtin_memset(x + w.width * stride, 0, stride * sizeof(float));
  }
}

void run_tile(const Linear& op, int64_t count, int64_t block, int64_t chunk0, int64_t chunk1, const float* x, float* y) {
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  if (vectors == 1) return run_block<1>(op, block, chunk0, chunk1, x, y);
  if (vectors == 2) return run_block<2>(op, block, chunk0, chunk1, x, y);
  return run_block<3>(op, block, chunk0, chunk1, x, y);
}

template <int B = 0>
FANIN_INLINE void store_pieces(float* out, int64_t step, vf v) {
  store_raw(out + B * step, piece<B>(v));
  if constexpr (B + 1 < kLanes / kPiece) store_pieces<B + 1>(out, step, v);
}

void turn(const float* sums, int64_t stride, int64_t rows, int64_t step, float* turned) {
  for (int64_t i = 0; i < rows; i += kPiece) {
    vf v[kPiece];
    for (int64_t j = 0; j < kPiece; ++j)                      // past the last row the first, which nobody reads
      v[j] = load_raw<vf>(sums + (i + j < rows ? i + j : 0) * stride);
    transpose_pieces(v);
    for (int64_t j = 0; j < kPiece; ++j) store_pieces(turned + j * step + i, kPiece * step, v[j]);
  }
}

void hidden(Act act, const float* sums, const float* bias, int64_t rows, int64_t stride, bool times, float* h) {
  with_act(act, [&](auto kAct) {
    for (int64_t r = 0; r < rows; ++r, sums += stride, h += stride) {
      const vf b = splat(bias[r]);
      for (int64_t g = 0; g < stride; g += kLanes) {
        vf v = activate<kAct.value>(load_raw<vf>(sums + g) + b);
        if (times) v *= load_raw<vf>(h + g);
        store_raw(h + g, v);
      }
    }
  });
}

constexpr Tiling kTiling{kLanes, pack_tile, run_tile, turn, hidden};

}  // namespace

#if defined(FANIN_HALVED)
const Tiling* half_tiling() { return &kTiling; }
#else
const Tiling& whole_tiling() { return kTiling; }
#endif

}  // namespace fanin
