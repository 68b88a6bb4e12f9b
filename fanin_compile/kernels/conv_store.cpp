// Epilogue: sums -> bias, residual, activation, storage type -> y.
#include <algorithm>
#include <utility>

#include "activation.h"
#include "conv_parts.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv::FANIN_WIDTH {
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

// One place in each cache line of y that a tile touches.
template <class X>
std::vector<int64_t> lines_of(const Tile& tile, const Places& places) {
  constexpr int64_t kElements = 64 / sizeof(X);
  std::vector<int64_t> lines;
  for (int t = 0; t < tile.parts * tile.vectors; t += tile.vectors)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t i = 0, at = places.at[t][lane]; i < tile.vectors; i += kElements)
        if (at >= 0 && (lines.empty() || at + i >= lines.back() + kElements || at + i < lines.back())) lines.push_back(at + i);
  return lines;
}

// kPiece neighbours of each lane's block, v, to y, lane's first one at[lane] elements away.
template <Act A, class X, int... B>
FANIN_INLINE void put_pieces(X* y, const X* residual, const int64_t* at, vf (&v)[kPiece], std::integer_sequence<int, B...>) {
  transpose_pieces(v);                          // piece b of v[j]: neighbours of lane b * kPiece + j
#pragma GCC unroll 4
  for (int j = 0; j < kPiece; ++j) {
    if (residual)
      v[j] += gather_pieces<kLanes>(0, [&](int b) __attribute__((always_inline)) { return widen<kPiece>(residual + at[b * kPiece + j]); });
    v[j] = activate<A>(v[j]);
    (narrow<kPiece>(y + at[B * kPiece + j], piece<B>(v[j])), ...);
  }
}

// Spatial, planar: kPiece vectors are transposed into a piece of a row for each lane.
template <Act A, class X>
void blocks(const Op& op, const Tile& tile, const Places& places, const Output<X>& to, const float* sums, int64_t first,
            int64_t last) {
  using Pieces = std::make_integer_sequence<int, kLanes / kPiece>;
  const std::vector<int64_t> lines = lines_of<X>(tile, places);
  bool whole = tile.vectors >= kPiece;
  for (int lane = 0; lane < kLanes; ++lane) whole = whole && places.at[0][lane] >= 0;
  for (int64_t r = first; r < last; ++r) {
    const int64_t channel = op.weight->rows()[r], base = channel * places.channel;
    const int64_t ahead = op.weight->rows()[std::min(r + kRowsAhead, last - 1)] * places.channel;
    for (const int64_t line : lines) to.prefetch(ahead + line);
    const vf bias = splat(bias_at(op, channel));
    X* y = to.y + base;
    const X* residual = to.of(base);
    for (int part = 0; part < tile.parts; ++part, sums += tile.vectors * kLanes) {
      const auto& at = places.at[part * tile.vectors];
      if (whole) {
        for (int i = 0; i < tile.vectors; i += kPiece) {
          i = std::min(i, tile.vectors - kPiece);             // the last ones may be stored twice
          vf v[kPiece];
#pragma GCC unroll 4
          for (int j = 0; j < kPiece; ++j) v[j] = load_raw<vf>(sums + (i + j) * kLanes) + bias;
          put_pieces<A>(y + i, residual ? residual + i : nullptr, at, v, Pieces{});
        }
      } else {
        for (int i = 0; i < tile.vectors; ++i) {
          const vf v = load_raw<vf>(sums + i * kLanes) + bias;
          for (int lane = 0; lane < kLanes; ++lane)
            if (at[lane] >= 0) put_some<A>(y + at[lane] + i, residual ? residual + at[lane] + i : nullptr, splat(v[lane]), 1);
        }
      }
    }
  }
}

// kLanes rows of kPiece lanes are transposed into kPiece vectors of channels: pixels one vector of them after the other, as all
// channels of a pixel stand together, and pixels a power of two apart would meet in a few sets of L1.
template <Act A, class X>
void channels_last(const Op& op, const Tile& tile, const Places& places, const Output<X>& to, const float* sums,
                   int64_t first, int64_t last) {
  constexpr int64_t kElements = 64 / sizeof(X);
  const int64_t vectors = tile.parts * tile.vectors, stride = vectors * kLanes;
  const int32_t* channels = op.weight->rows();
  std::vector<float> biases(last - first);
  for (int64_t r = first; r < last; ++r) biases[r - first] = bias_at(op, channels[r]);
  for (int64_t t = 0; t < vectors; ++t) {
    const int64_t *at = places.at[t], *next = places.at[std::min(t + 1, vectors - 1)];
    int64_t requested = -1;
    for (int64_t r = first; r < last; r += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, last - r);
      const int32_t* channel = channels + r;
      if (channel[0] / kElements != requested) {              // lines of the next pixels
        requested = channel[0] / kElements;
        for (int lane = 0; lane < kLanes; ++lane) to.prefetch(std::max<int64_t>(next[lane], 0) + channel[0]);
      }
      vf bias{};
      for (int64_t i = 0; i < rows; ++i) bias[i] = biases[r - first + i];
      const float* from = sums + (r - first) * stride + t * kLanes;
      const auto block = [&](int64_t lane, auto row, auto&& put_one) __attribute__((always_inline)) {
        vf v[kPiece];                                         // piece b of v[j]: lanes of row b * kPiece + j
#pragma GCC unroll 4
        for (int j = 0; j < kPiece; ++j)
          v[j] = gather_pieces<kLanes>(0, [&](int b) __attribute__((always_inline)) { return load_raw<vp>(from + row(b * kPiece + j) * stride + lane); });
        transpose_pieces(v);
#pragma GCC unroll 4
        for (int j = 0; j < kPiece; ++j)
          if (at[lane + j] >= 0) put_one(at[lane + j], v[j] + bias);
      };
      if (rows == kLanes && channel[kLanes - 1] - channel[0] == kLanes - 1) {
        for (int64_t lane = 0; lane < kLanes; lane += kPiece)
          block(lane, [](int64_t i) { return i; }, [&](int64_t pixel, vf v) __attribute__((always_inline)) {
            put<A>(to.y + pixel + channel[0], to.of(pixel + channel[0]), v);
          });
      } else {
        for (int64_t lane = 0; lane < kLanes; lane += kPiece)
          block(lane, [&](int64_t i) { return std::min(i, rows - 1); }, [&](int64_t pixel, vf v) __attribute__((always_inline)) {
            for (int64_t c = 0; c < rows; ++c) put_some<A>(to.y + pixel + channel[c], to.of(pixel + channel[c]), splat(v[c]), 1);
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

}  // namespace fanin::conv::bytesN
