// Copies channels of an image into zero-padded planes, one plane per phase of the stride.
#include <algorithm>

#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

// One row of one plane: zeros, pixels, zeros.
struct Row {
  int64_t at;                   // in the plane
  int64_t head, count, tail;
  int64_t zeros;                // tail and the next row's head
  int64_t pixel;                // of the image, where count starts
};

// The rows of positions [from, from + count) of a plane.
std::vector<Row> rows_of(const Shape& s, const Layout& l, const Phase& phase, int64_t from, int64_t count) {
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  std::vector<Row> rows;
  for (int64_t at = from; at < from + count;) {
    const int64_t row = floor_div(at + l.halo[2], l.pitch), x = at - row * l.pitch;
    const int64_t slice = floor_div(row + l.halo[1], l.rows), y = row - slice * l.rows;
    const int64_t length = std::min(l.pitch - l.halo[2] - x, from + count - at);
    const int64_t iz = slice * s.stride[0] + phase.at[0], iy = y * s.stride[1] + phase.at[1];
    const bool inside = iz >= 0 && iz < s.in[0] && iy >= 0 && iy < s.in[1];
    const int64_t width = inside ? (s.in[2] - phase.at[2] + s.stride[2] - 1) / s.stride[2] : 0;
    const int64_t begin = std::clamp<int64_t>(0, x, x + length), end = std::clamp<int64_t>(width, begin, x + length);
    rows.push_back({at - from, begin - x, end - begin, x + length - end, x + length - end,
                    end > begin ? (iz * s.in[1] + iy) * s.in[2] + begin * s.stride[2] + phase.at[2] : 0});
    if (rows.size() > 1) rows[rows.size() - 2].zeros += rows.back().head;
    at += length;
  }
  return rows;
}

// The rows of one plane, or of two that interleave in x: even and odd pixels of the same rows.
struct Planes {
  int64_t plane;                // the first, which holds the lower pixels
  int64_t other;                // the second, or -1
  std::vector<Row> rows, others;
};

std::vector<Planes> planes_of(const Plan& plan, int64_t unit) {
  const Shape& s = plan.shape;
  const Layout& l = plan.layout;
  const int64_t from = l.first(unit * l.tiles / l.units) * kLanes + l.low, phases = static_cast<int64_t>(l.phases.size());
  std::vector<Planes> all;
  std::vector<bool> done(phases);
  for (int64_t i = 0; i < phases; ++i) {
    if (done[i]) continue;
    Planes p{i, -1, rows_of(s, l, l.phases[i], from, l.plane - kLanes), {}};
    for (int64_t j = i + 1; j < phases && s.stride[2] == 2; ++j) {
      const Dims &a = l.phases[i].at, &b = l.phases[j].at;
      if (a[0] == b[0] && a[1] == b[1]) p.other = j;
    }
    if (p.other >= 0) {
      done[p.other] = true;
      p.others = rows_of(s, l, l.phases[p.other], from, l.plane - kLanes);
      if (l.phases[i].at[2] == 1) std::swap(p.plane, p.other), std::swap(p.rows, p.others);
    }
    all.push_back(std::move(p));
  }
  return all;
}

// lanes H, H + 2, ... of a and b: first inside 128-bit pieces, then pairs of lanes into their places
template <int H, int... I>
FANIN_INLINE vf every_other(vf a, vf b, std::integer_sequence<int, I...>) {
  if constexpr (kLanes < 4) {
    return __builtin_shufflevector(a, b, (2 * I + H)...);
  } else {
    constexpr int half = kLanes / 2;
    const vf v = __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + H + I % 4 / 2 * kLanes)...);
    return __builtin_shufflevector(v, v, (I < half ? I / 2 * 4 + I % 2 : (I - half) / 2 * 4 + 2 + I % 2)...);
  }
}

// Copies may write up to a vector too much: what follows is written later, or is slack.
FANIN_INLINE void zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store_raw(to + i, vf{});
}

// Reads up to two vectors too much if Whole.
template <bool Whole, class X>
FANIN_INLINE void copy(const X* x, int64_t count, int64_t stride, float* to) {
  using S = detail::seq<kLanes>;
  if (Whole && stride == 1) {
    for (int64_t i = 0; i < count; i += kLanes) store_raw(to + i, widen<kLanes>(x + i));
  } else if (Whole && stride == 2) {
    for (int64_t i = 0; i < count; i += kLanes)
      store_raw(to + i, every_other<0>(widen<kLanes>(x + 2 * i), widen<kLanes>(x + 2 * i + kLanes), S{}));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen1(x + i * stride);
  }
}

// Even pixels to one plane, odd ones to another.
template <bool Whole, class X>
FANIN_INLINE void split(const X* x, int64_t evens, int64_t odds, float* even, float* odd) {
  using S = detail::seq<kLanes>;
  if (Whole) {
    for (int64_t i = 0; i < evens; i += kLanes) {
      const vf a = widen<kLanes>(x + 2 * i), b = widen<kLanes>(x + 2 * i + kLanes);
      store_raw(even + i, every_other<0>(a, b, S{}));
      store_raw(odd + i, every_other<1>(a, b, S{}));
    }
  } else {
    for (int64_t i = 0; i < evens; ++i) even[i] = widen1(x + 2 * i);
    for (int64_t i = 0; i < odds; ++i) odd[i] = widen1(x + 2 * i + 1);
  }
}

constexpr int64_t kChannelsAhead = 3;           // channels lie far apart: their pixels are requested early

struct Span {
  int64_t begin, end;
};

// Pixels of a channel from the first that is read to the last.
Span pixels_of(const Shape& s, const std::vector<Planes>& planes) {
  Span span{s.pixels_in(), 0};
  for (const Planes& p : planes)
    for (const std::vector<Row>* rows : {&p.rows, &p.others})
      for (const Row& row : *rows)
        if (row.count > 0) {
          span.begin = std::min(span.begin, row.pixel);
          span.end = std::max(span.end, row.pixel + (row.count - 1) * s.stride[2] + 1);
        }
  return span;
}

template <bool Whole, class X>
void pack_channel(const Planes& p, const X* x, int64_t stride, float* first, float* second) {
  const Row *row = p.rows.data(), *end = row + p.rows.size();
  if (p.other < 0) {
    zero(first, row->head);
    for (; row < end; ++row) {
      copy<Whole>(x + row->pixel, row->count, stride, first + row->at + row->head);
      zero(first + row->at + row->head + row->count, row->zeros);
    }
    return;
  }
  zero(first, row->head);
  zero(second, p.others[0].head);
  for (const Row* other = p.others.data(); row < end; ++row, ++other) {
    float *even = first + row->at + row->head, *odd = second + other->at + other->head;
    if (row->head == other->head && row->count >= other->count) {
      split<Whole>(x + row->pixel, row->count, other->count, even, odd);
    } else {
      copy<Whole>(x + row->pixel, row->count, stride, even);
      copy<Whole>(x + other->pixel, other->count, stride, odd);
    }
    zero(even + row->count, row->zeros);
    zero(odd + other->count, other->zeros);
  }
}

template <class X>
void pack_planar(const Op& op, int64_t image, const std::vector<Planes>& planes, float* out) {
  const Shape& s = op.plan->shape;
  const Layout& l = op.plan->layout;
  const int64_t pixels = s.pixels_in();
  const X* x = static_cast<const X*>(op.x) + image * s.in_channels * pixels;
  const X* limit = static_cast<const X*>(op.x) + op.batch * s.in_channels * pixels - 2 * kLanes;
  const Span span = pixels_of(s, planes);
  for (int64_t c = 0; c < s.in_channels; ++c, x += pixels, out += l.channel) {
    const X* ahead = x + std::min(kChannelsAhead, s.in_channels - 1 - c) * pixels;
    for (int64_t i = span.begin; i < span.end; i += 64 / int64_t{sizeof(X)}) __builtin_prefetch(ahead + i);
    for (const Planes& p : planes) {
      float *first = out + p.plane * l.plane, *second = out + std::max<int64_t>(p.other, 0) * l.plane;
      if (x + span.end <= limit) pack_channel<true>(p, x, s.stride[2], first, second);
      else pack_channel<false>(p, x, s.stride[2], first, second);
    }
  }
}

template <class X>
void pack_last(const Op& op, int64_t image, const std::vector<Row>& rows, float* plane) {
  const Shape& s = op.plan->shape;
  const int64_t channels = s.in_channels, step = s.stride[2] * channels, out = op.plan->layout.channel;
  const X* x = static_cast<const X*>(op.x) + image * channels * s.pixels_in();
  for (const Row& row : rows) {
    const int64_t at = row.at;
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
        const int64_t to = at + row.head + i;
        for (int j = 0; j < kPiece; ++j) {
          store_raw(plane + (c + j) * out + to, v[j]);
        }
      }
      for (int j = 0; j < kPiece; ++j) {
        float* to = plane + (c + j) * out + at;
        for (int64_t i = 0; i < row.head; ++i) to[i] = 0.0f;
        for (int64_t i = 0; i < row.tail; ++i) to[row.head + row.count + i] = 0.0f;
      }
    }
    for (; c < channels; ++c) {
      float* to = plane + c * out + at;
      for (int64_t i = 0; i < row.head; ++i) to[i] = 0.0f;
      for (int64_t i = 0; i < row.count; ++i) to[row.head + i] = widen1(from + i * step + c);
      for (int64_t i = 0; i < row.tail; ++i) to[row.head + row.count + i] = 0.0f;
    }
  }
}

}  // namespace

void pack(const Op& op, int64_t image, int64_t unit, float* planes) {
  const std::vector<Planes> all = planes_of(*op.plan, unit);
  with_dtype(op.x_type, [&](auto zero) {
    using X = decltype(zero);
    if (!op.channels_last) return pack_planar<X>(op, image, all, planes);
    for (const Planes& p : all) {
      pack_last<X>(op, image, p.rows, planes + p.plane * op.plan->layout.plane);
      if (p.other >= 0) pack_last<X>(op, image, p.others, planes + p.other * op.plan->layout.plane);
    }
  });
}

}  // namespace fanin::conv
