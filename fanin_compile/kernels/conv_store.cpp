// Epilogue: sums -> bias, residual, activation, storage type -> y.
#include <algorithm>

#include "activation.h"
#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

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

constexpr int64_t kRowsAhead = 4;               // output channels lie far apart: their lines are requested early

// Pieces follow each other in y: all but the last may be written a vector at a time, past their end.
template <Act A, class X>
void planar(const Op& op, int64_t image, const std::vector<Piece>& pieces, const float* sums, int64_t stride, int64_t first,
            int64_t last) {
  const Shape& s = op.plan->shape;
  const int64_t end = pieces.back().pixel + pieces.back().count;
  for (int64_t r = first; r < last; ++r, sums += stride) {
    const int64_t channel = op.plan->live[r], at = (image * s.out_channels + channel) * s.pixels_out();
    X* y = static_cast<X*>(op.y) + at;
    const X* residual = op.residual ? static_cast<const X*>(op.residual) + at : nullptr;
    const int64_t ahead = op.plan->live[std::min(r + kRowsAhead, last - 1)] - channel;
    for (int64_t i = pieces[0].pixel; i < end; i += 64 / int64_t{sizeof(X)}) {
      __builtin_prefetch(y + ahead * s.pixels_out() + i, 1);
      if (residual) __builtin_prefetch(residual + ahead * s.pixels_out() + i);
    }
    const vf bias = splat(bias_at(op, channel));
    for (const Piece& p : pieces) {
      const float* from = sums + p.lane;
      const int64_t whole = std::min(p.count, end - p.pixel - kLanes + 1);
      int64_t i = 0;
      for (; i < whole; i += kLanes)
        put<A>(y + p.pixel + i, residual ? residual + p.pixel + i : nullptr, load_raw<vf>(from + i) + bias);
      for (; i < p.count; i += kLanes)
        put_some<A>(y + p.pixel + i, residual ? residual + p.pixel + i : nullptr, load_raw<vf>(from + i) + bias,
                    std::min<int64_t>(kLanes, p.count - i));
    }
  }
}

// kLanes rows of kPiece outputs are transposed into kPiece vectors of channels.
template <Act A, class X>
void channels_last(const Op& op, int64_t image, const std::vector<Piece>& pieces, const float* sums, int64_t stride,
                   int64_t first, int64_t last) {
  const Shape& s = op.plan->shape;
  const int64_t base = image * s.out_channels * s.pixels_out();
  X* y = static_cast<X*>(op.y) + base;
  const X* residual = op.residual ? static_cast<const X*>(op.residual) + base : nullptr;
  for (int64_t r = first; r < last; r += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, last - r);
    const int32_t* channel = op.plan->live.data() + r;
    const bool whole = rows == kLanes && channel[kLanes - 1] - channel[0] == kLanes - 1;
    vf bias{};
    for (int64_t i = 0; i < rows; ++i) bias[i] = bias_at(op, channel[i]);
    const auto row = [&](int64_t i) { return sums + (r - first + std::min(i, rows - 1)) * stride; };
    for (const Piece& p : pieces)
      for (int64_t i = 0; i < p.count; i += kPiece) {
        vf v[kPiece];                                         // piece b of v[j]: outputs i.. of row b * kPiece + j
        for (int j = 0; j < kPiece; ++j)
          v[j] = gather_pieces<kLanes>(0, [&](int b) { return load_raw<vp>(row(b * kPiece + j) + p.lane + i); });
        transpose_pieces(v);
        for (int j = 0; j < kPiece && i + j < p.count; ++j) {
          const int64_t at = (p.pixel + i + j) * s.out_channels;
          if (whole) {
            put<A>(y + at + channel[0], residual ? residual + at + channel[0] : nullptr, v[j] + bias);
          } else {
            for (int64_t c = 0; c < rows; ++c)
              put_some<A>(y + at + channel[c], residual ? residual + at + channel[c] : nullptr, splat(v[j][c] + bias[c]), 1);
          }
        }
      }
  }
}

template <Act A, class X>
void dead(const Op& op, int64_t image) {
  const Shape& s = op.plan->shape;
  const int64_t pixels = s.pixels_out(), base = image * s.out_channels * pixels;
  X* y = static_cast<X*>(op.y) + base;
  const X* residual = op.residual ? static_cast<const X*>(op.residual) + base : nullptr;
  for (const int32_t channel : op.plan->dead) {
    const vf bias = splat(bias_at(op, channel));
    const int64_t step = op.channels_last ? 1 : kLanes;
    for (int64_t i = 0; i < pixels; i += step) {
      const int64_t at = op.channels_last ? i * s.out_channels + channel : channel * pixels + i;
      put_some<A>(y + at, residual ? residual + at : nullptr, bias, std::min(step, pixels - i));
    }
  }
}

template <class F>
void with_types(const Op& op, F&& f) {
  with_dtype(op.x_type, [&](auto x) { with_act(op.act, [&](auto act) { f(act, x); }); });
}

}  // namespace

void store(const Op& op, int64_t image, const std::vector<Piece>& pieces, const float* sums, int64_t stride, int64_t first,
           int64_t last) {
  if (pieces.empty()) return;
  with_types(op, [&](auto act, auto x) {
    constexpr Act A = decltype(act)::value;
    using X = decltype(x);
    op.channels_last ? channels_last<A, X>(op, image, pieces, sums, stride, first, last)
                     : planar<A, X>(op, image, pieces, sums, stride, first, last);
  });
}

void run_dead(const Op& op, int64_t image) {
  with_types(op, [&](auto act, auto x) { dead<decltype(act)::value, decltype(x)>(op, image); });
}

}  // namespace fanin::conv
