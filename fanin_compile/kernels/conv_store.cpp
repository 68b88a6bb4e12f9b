// Epilogue: sums -> bias, residual, activation, storage type -> y.
#include <algorithm>
#include <utility>

#include "activation.h"
#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

constexpr int64_t kRowsAhead = 4;               // output channels lie far apart: their lines are requested early

float bias_at(const Op& op, int64_t channel) {
  if (!op.bias) return 0.0f;
  return with_dtype(op.bias_type, [&](auto z) { return widen1(static_cast<const decltype(z)*>(op.bias) + channel); });
}

template <Act A, class X>
FANIN_INLINE void put(X* y, const X* residual, vf v) {
  if (residual) v += widen<kLanes>(residual);
  narrow<kLanes>(y, activate<A>(v));
}

template <Act A, class X>
FANIN_INLINE void put_some(X* y, const X* residual, vf v, int64_t count) {
  X buffer[kLanes] = {};
  if (residual) {
    __builtin_memcpy(buffer, residual, count * sizeof(X));
    v += widen<kLanes>(buffer);
  }
  narrow<kLanes>(buffer, activate<A>(v));
  __builtin_memcpy(y, buffer, count * sizeof(X));
}

template <class X>
struct Output {
  X* y;
  const X* residual;            // or null

  FANIN_INLINE const X* of(int64_t at) const { return residual ? residual + at : nullptr; }
  FANIN_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(y + at, 1);
    if (residual) __builtin_prefetch(residual + at);
  }
};

// Pointwise, planar: the lanes of a vector are consecutive, but where an image ends.
template <Act A, class X>
void pixels(const Op& op, const Tile& tile, const Places& places, const Output<X>& to, const float* sums, int64_t first,
            int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const int64_t channel = op.weight->rows()[r], base = channel * places.channel;
    const int64_t ahead = op.weight->rows()[std::min(r + kRowsAhead, last - 1)] * places.channel;
    const vf bias = splat(bias_at(op, channel));
    for (int t = 0; t < tile.vectors; ++t, sums += kLanes) {
      const int64_t* at = places.at[t];
      const vf v = load_raw<vf>(sums) + bias;
      to.prefetch(ahead + at[0]);
      if (at[kLanes - 1] == at[0] + kLanes - 1) {
        put<A>(to.y + base + at[0], to.of(base + at[0]), v);
      } else {
        for (int lane = 0; lane < kLanes; ++lane)
          if (at[lane] >= 0) put_some<A>(to.y + base + at[lane], to.of(base + at[lane]), splat(v[lane]), 1);
      }
    }
  }
}

// kPiece neighbours of each lane's block, from vector t on.
struct Pieces {
  int t, count;
  bool all;                     // in all lanes there are kPiece of them
};

std::vector<Pieces> pieces_of(const Tile& tile, const Places& places) {
  std::vector<Pieces> pieces;
  for (int part = 0; part < tile.parts; ++part)
    for (int i = 0; i < tile.vectors; i += kPiece) {
      if (tile.vectors >= kPiece) i = std::min(i, tile.vectors - kPiece);   // the last ones may be stored twice
      Pieces p{part * tile.vectors + i, std::min(kPiece, tile.vectors - i), tile.vectors >= kPiece};
      for (int lane = 0; lane < kLanes; ++lane)
        p.all = p.all && places.at[p.t][lane] >= 0 && places.at[p.t + p.count - 1][lane] >= 0;
      pieces.push_back(p);
    }
  return pieces;
}

// One place in each cache line of y that a tile touches.
template <class X>
std::vector<int64_t> lines_of(const Tile& tile, const Places& places) {
  constexpr int64_t kLine = 64 / sizeof(X);
  std::vector<int64_t> lines;
  for (int t = 0; t < tile.parts * tile.vectors; t += tile.vectors)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t i = 0, at = places.at[t][lane]; i < tile.vectors; i += kLine)
        if (at >= 0 && (lines.empty() || at + i >= lines.back() + kLine || at + i < lines.back())) lines.push_back(at + i);
  return lines;
}

// Adds residuals, if there are any, and activates.
template <Act A, class X>
FANIN_INLINE void finish_pieces(const Output<X>& to, const Pieces& p, const Places& places, int64_t base, vf (&v)[kPiece]) {
  for (int j = 0; j < kPiece; ++j) {
    if (to.residual)
      v[j] += gather_pieces<kLanes>(0, [&](int b) {
        const int lane = b * kPiece + j;
        if (p.all) return widen<kPiece>(to.residual + base + places.at[p.t][lane]);
        vp piece{};
        for (int i = 0; i < p.count; ++i)
          if (const int64_t at = places.at[p.t + i][lane]; at >= 0) piece[i] = widen1(to.residual + base + at);
        return piece;
      });
    v[j] = activate<A>(v[j]);
  }
}

template <int B, class X>
FANIN_INLINE void put_pieces(X* y, const Pieces& p, const Places& places, const vf (&v)[kPiece]) {
  for (int j = 0; j < kPiece; ++j) {
    const int lane = B * kPiece + j;
    if (p.all) {
      narrow<kPiece>(y + places.at[p.t][lane], piece<B>(v[j]));
    } else {
      for (int i = 0; i < p.count; ++i)
        if (const int64_t at = places.at[p.t + i][lane]; at >= 0) narrow1(y + at, v[j][B * kPiece + i]);
    }
  }
}

// Spatial, planar: kPiece vectors are transposed into a piece of a row for each lane.
template <Act A, class X>
void blocks(const Op& op, const Tile& tile, const Places& places, const Output<X>& to, const float* sums, int64_t first,
            int64_t last) {
  const std::vector<Pieces> pieces = pieces_of(tile, places);
  const std::vector<int64_t> lines = lines_of<X>(tile, places);
  for (int64_t r = first; r < last; ++r, sums += tile.parts * tile.vectors * kLanes) {
    const int64_t channel = op.weight->rows()[r], base = channel * places.channel;
    const int64_t ahead = op.weight->rows()[std::min(r + kRowsAhead, last - 1)] * places.channel;
    for (const int64_t line : lines) to.prefetch(ahead + line);
    const vf bias = splat(bias_at(op, channel));
    for (const Pieces& p : pieces) {
      vf v[kPiece];                                           // piece b of v[j]: neighbours of lane b * kPiece + j
      for (int j = 0; j < kPiece; ++j) v[j] = load_raw<vf>(sums + (p.t + std::min(j, p.count - 1)) * kLanes) + bias;
      transpose_pieces(v);
      const auto put = [&]<int... B>(const Pieces& known, std::integer_sequence<int, B...>) __attribute__((always_inline)) {
        finish_pieces<A>(to, known, places, base, v);
        (put_pieces<B>(to.y + base, known, places, v), ...);
      };
      if (p.all) put({p.t, kPiece, true}, std::make_integer_sequence<int, kLanes / kPiece>{});
      else put({p.t, p.count, false}, std::make_integer_sequence<int, kLanes / kPiece>{});
    }
  }
}

// kLanes rows of kPiece lanes are transposed into kPiece vectors of channels.
template <Act A, class X>
void channels_last(const Op& op, const Tile& tile, const Places& places, const Output<X>& to, const float* sums,
                   int64_t first, int64_t last) {
  constexpr int64_t kAhead = 4 * kLanes;        // pixels lie far apart, too: their lines are requested some rows early
  const int64_t vectors = tile.parts * tile.vectors, stride = vectors * kLanes;
  const int32_t* channels = op.weight->rows();
  const auto prefetch = [&](int64_t r) {
    for (int64_t t = 0; t < vectors; ++t)
      for (int64_t lane = 0; lane < kLanes; ++lane) to.prefetch(std::max<int64_t>(places.at[t][lane], 0) + channels[r]);
  };
  for (int64_t r = first; r < std::min(first + kAhead, last); r += kLanes) prefetch(r);
  for (int64_t r = first; r < last; r += kLanes, sums += kLanes * stride) {
    const int64_t rows = std::min<int64_t>(kLanes, last - r);
    const int32_t* channel = channels + r;
    if (r + kAhead < last) prefetch(r + kAhead);
    vf bias{};
    for (int64_t i = 0; i < rows; ++i) bias[i] = bias_at(op, channel[i]);
    const auto block = [&](int64_t t, int64_t lane, auto row, auto&& put_one) __attribute__((always_inline)) {
      vf v[kPiece];                                           // piece b of v[j]: lanes of row b * kPiece + j
      for (int j = 0; j < kPiece; ++j)
        v[j] = gather_pieces<kLanes>(0, [&](int b) { return load_raw<vp>(sums + row(b * kPiece + j) * stride + t * kLanes + lane); });
      transpose_pieces(v);
      for (int j = 0; j < kPiece; ++j)
        if (const int64_t at = places.at[t][lane + j]; at >= 0) put_one(at, v[j] + bias);
    };
    const bool whole = rows == kLanes && channel[kLanes - 1] - channel[0] == kLanes - 1;
    for (int64_t t = 0; t < vectors; ++t)
      for (int64_t lane = 0; lane < kLanes; lane += kPiece) {
        if (whole) {
          block(t, lane, [](int64_t i) { return i; }, [&](int64_t at, vf v) __attribute__((always_inline)) {
            put<A>(to.y + at + channel[0], to.of(at + channel[0]), v);
          });
        } else {
          block(t, lane, [&](int64_t i) { return std::min(i, rows - 1); }, [&](int64_t at, vf v) __attribute__((always_inline)) {
            for (int64_t c = 0; c < rows; ++c) put_some<A>(to.y + at + channel[c], to.of(at + channel[c]), splat(v[c]), 1);
          });
        }
      }
  }
}

template <Act A, class X>
void dead(const Op& op, int64_t image) {
  const Shape& s = op.geometry->shape;
  const int64_t pixels = s.pixels_out(), base = image * s.out_channels * pixels;
  const Output<X> to{static_cast<X*>(op.y) + base, op.residual ? static_cast<const X*>(op.residual) + base : nullptr};
  for (int64_t r = op.weight->live; r < op.weight->out; ++r) {
    const int32_t channel = op.weight->rows()[r];
    const vf bias = splat(bias_at(op, channel));
    const int64_t step = op.channels_last ? 1 : kLanes;
    for (int64_t i = 0; i < pixels; i += step) {
      const int64_t at = op.channels_last ? i * s.out_channels + channel : channel * pixels + i;
      put_some<A>(to.y + at, to.of(at), bias, std::min(step, pixels - i));
    }
  }
}

template <class F>
void with_types(const Op& op, F&& f) {
  with_dtype(op.x_type, [&](auto x) { with_act(op.act, [&](auto act) { f(act, x); }); });
}

}  // namespace

void store(const Op& op, const Tile& tile, const Places& places, const float* sums, int64_t first, int64_t last) {
  with_types(op, [&](auto act, auto x) {
    constexpr Act A = decltype(act)::value;
    using X = decltype(x);
    const Output<X> to{static_cast<X*>(op.y), static_cast<const X*>(op.residual)};
    const auto put = op.channels_last ? channels_last<A, X> : op.geometry->layout.pointwise ? pixels<A, X> : blocks<A, X>;
    put(op, tile, places, to, sums, first, last);
  });
}

void run_dead(const Op& op, int64_t image) {
  with_types(op, [&](auto act, auto x) { dead<decltype(act)::value, decltype(x)>(op, image); });
}

}  // namespace fanin::conv
