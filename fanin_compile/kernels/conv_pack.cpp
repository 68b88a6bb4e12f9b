// Copies channels of an image into zero-padded planes, one plane per phase of the stride.
#include <algorithm>

#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

// One row of one plane: zeros, pixels, zeros.
struct Row {
  int64_t head, count, tail;
  int64_t pixel;                // of the image, where count starts
};

// The rows of positions [from, from + count) of a plane.
void rows_of(const Shape& s, const Layout& l, const Phase& phase, int64_t from, int64_t count, std::vector<Row>& rows) {
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  for (int64_t at = from; at < from + count;) {
    const int64_t row = floor_div(at + l.halo[2], l.pitch), x = at - row * l.pitch;
    const int64_t slice = floor_div(row + l.halo[1], l.rows), y = row - slice * l.rows;
    const int64_t length = std::min(l.pitch - l.halo[2] - x, from + count - at);
    const int64_t iz = slice * s.stride[0] + phase.at[0], iy = y * s.stride[1] + phase.at[1];
    const bool inside = iz >= 0 && iz < s.in[0] && iy >= 0 && iy < s.in[1];
    const int64_t width = inside ? (s.in[2] - phase.at[2] + s.stride[2] - 1) / s.stride[2] : 0;
    const int64_t begin = std::clamp<int64_t>(0, x, x + length), end = std::clamp<int64_t>(width, begin, x + length);
    rows.push_back({begin - x, end - begin, x + length - end,
                    end > begin ? (iz * s.in[1] + iy) * s.in[2] + begin * s.stride[2] + phase.at[2] : 0});
    at += length;
  }
}

template <int... I>
FANIN_INLINE vf even(vf a, vf b, std::integer_sequence<int, I...>) { return __builtin_shufflevector(a, b, (2 * I)...); }

// Copies may write up to a vector too much: what follows is written later, or is slack.
FANIN_INLINE float* zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store_raw(to + i, vf{});
  return to + count;
}

template <class X>
float* copy(const X* x, const X* limit, int64_t count, int64_t stride, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i < count && x + i + kLanes <= limit; i += kLanes) store_raw(to + i, widen<kLanes>(x + i));
  } else if (stride == 2) {
    for (; i < count && x + 2 * (i + kLanes) <= limit; i += kLanes)
      store_raw(to + i, even(widen<kLanes>(x + 2 * i), widen<kLanes>(x + 2 * i + kLanes), detail::seq<kLanes>{}));
  }
  for (; i < count; ++i) to[i] = widen1(x + i * stride);
  return to + count;
}

template <class X>
void pack_planar(const Op& op, int64_t image, const std::vector<Row>& rows, float* planes) {
  const Shape& s = op.plan->shape;
  const int64_t pixels = s.pixels_in();
  const X* x = static_cast<const X*>(op.x);
  const X* limit = x + op.batch * s.in_channels * pixels;
  x += image * s.in_channels * pixels;
  float* to = planes;
  for (int64_t c = 0; c < s.in_channels; ++c)
    for (const Row& row : rows) {
      to = zero(to, row.head);
      to = copy(x + c * pixels + row.pixel, limit, row.count, s.stride[2], to);
      to = zero(to, row.tail);
    }
}

template <class X>
void pack_last(const Op& op, int64_t image, const std::vector<Row>& rows, float* planes) {
  const Shape& s = op.plan->shape;
  const int64_t channels = s.in_channels, step = s.stride[2] * channels, out = op.plan->layout.channel;
  const X* x = static_cast<const X*>(op.x) + image * channels * s.pixels_in();
  int64_t at = 0;
  for (const Row& row : rows) {
    const X* from = x + row.pixel * channels;
    int64_t c = 0;
    for (; c + kPiece <= channels; c += kPiece) {
      for (int64_t i = 0; i < row.count; i += kLanes) {
        vf v[kPiece];                                         // piece b of v[j]: channels c.. of pixel i + b * kPiece + j
        for (int j = 0; j < kPiece; ++j)
          v[j] = gather_pieces<kLanes>(0, [&](int b) {
            const int64_t pixel = std::min<int64_t>(i + b * kPiece + j, row.count - 1);
            return widen<kPiece>(from + pixel * step + c);
          });
        transpose_pieces(v);
        const int64_t to = at + row.head + i, fits = out - to;  // the next channel's first row is already in place
        for (int j = 0; j < kPiece; ++j) {
          float* plane = planes + (c + j) * out + to;
          if (fits >= kLanes) store_raw(plane, v[j]);
          else __builtin_memcpy(plane, &v[j], fits * sizeof(float));
        }
      }
      for (int j = 0; j < kPiece; ++j) {
        float* to = planes + (c + j) * out + at;
        for (int64_t i = 0; i < row.head; ++i) to[i] = 0.0f;
        for (int64_t i = 0; i < row.tail; ++i) to[row.head + row.count + i] = 0.0f;
      }
    }
    for (; c < channels; ++c) {
      float* to = planes + c * out + at;
      for (int64_t i = 0; i < row.head; ++i) to[i] = 0.0f;
      for (int64_t i = 0; i < row.count; ++i) to[row.head + i] = widen1(from + i * step + c);
      for (int64_t i = 0; i < row.tail; ++i) to[row.head + row.count + i] = 0.0f;
    }
    at += row.head + row.count + row.tail;
  }
}

}  // namespace

void pack(const Op& op, int64_t image, int64_t unit, float* planes) {
  const Layout& l = op.plan->layout;
  const int64_t from = l.first(unit * l.tiles / l.units) * kLanes + l.low;
  std::vector<Row> rows;
  for (const Phase& phase : l.phases) rows_of(op.plan->shape, l, phase, from, l.plane, rows);
  with_dtype(op.x_type, [&](auto zero) {
    using X = decltype(zero);
    op.channels_last ? pack_last<X>(op, image, rows, planes) : pack_planar<X>(op, image, rows, planes);
  });
}

}  // namespace fanin::conv
