// Copies x to where the kernel reads it; of a pointwise layer, compact tiles of pixels.
#include <algorithm>

#include "conv_parts.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv::FANIN_WIDTH {
namespace {

// Vectors of pixels of channel 0, from element `at` on: consecutive ones, or a single vector of every second one.
struct Straight {
  int64_t at, vectors;
  float* out;

  bool goes_on(int64_t next, const float* to) const { return at + vectors * kLanes == next && out + vectors * kLanes == to; }
};
// Others, lane by lane.
struct Pixels {
  int64_t at[kLanes];           // beyond the last image: 0
  float* out;
};

struct Gathered {
  std::vector<Straight> straight, second;
  std::vector<Pixels> others;
};

// Of the outputs of a group of images, one after the other.
struct Walk {
  const Shape& s;
  int64_t step;                 // elements from a pixel to the next
  int64_t i, z, y, x;           // image, and output

  Walk(const Shape& shape, int64_t step, int64_t output) : s(shape), step(step) {
    x = output % s.out[2], y = output / s.out[2] % s.out[1];
    z = output / (s.out[2] * s.out[1]) % s.out[0], i = output / s.pixels_out();
  }
  int64_t at() const {
    const int64_t pixel = (z * s.stride[0] * s.in[1] + y * s.stride[1]) * s.in[2] + x * s.stride[2];
    return i * s.in_channels * s.pixels_in() + pixel * step;
  }
  void advance(int64_t by) {    // inside a row, or to the next one
    if ((x += by) < s.out[2]) return;
    x = 0;
    if (++y == s.out[1] && (y = 0, ++z == s.out[0])) z = 0, ++i;
  }
};

Gathered pixels_of(const Op& op, int64_t image, Range tiles, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t images = std::min(l.images, op.batch - image);
  Gathered g;
  Walk walk(s, op.channels_last ? s.in_channels : 1, l.tiles[tiles.first].x * kLanes);
  for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
    float* out = planes + (tile - tiles.first) * l.packed_channels(s) * l.channel;
    for (int64_t t = 0; t < l.tiles[tile].vectors; ++t, out += kLanes) {
      const bool in_row = !op.channels_last && walk.i < images && walk.x + kLanes <= s.out[2];
      if (in_row && s.stride[2] == 1) {
        if (!g.straight.empty() && g.straight.back().goes_on(walk.at(), out)) ++g.straight.back().vectors;
        else g.straight.push_back({walk.at(), 1, out});
        walk.advance(kLanes);
      } else if (in_row && s.stride[2] == 2) {
        g.second.push_back({walk.at(), 1, out});
        walk.advance(kLanes);
      } else {
        Pixels p{{}, out};
        for (int64_t lane = 0; lane < kLanes; ++lane, walk.advance(1))
          if (walk.i < images) p.at[lane] = walk.at();
        g.others.push_back(p);
      }
    }
  }
  return g;
}

template <class X>
void pack_pixels(const Op& op, int64_t image, Range tiles, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t channels = s.in_channels, pixels = s.pixels_in();
  const X* x = static_cast<const X*>(op.x) + image * channels * pixels;
  const auto [straight, second, others] = pixels_of(op, image, tiles, planes);
  const auto at = [&](int64_t c) { return (c / l.chunk * l.chunk_channels() + c % l.chunk) * l.channel; };
  if (l.together > 1)
    for (int64_t i = 0; i < tiles.last - tiles.first; ++i)
      for (int64_t c = 0; c < l.chunks(s); ++c)
        std::fill_n(planes + (i * l.packed_channels(s) + c * l.chunk_channels() + l.chunk) * l.channel, l.channel, 0.0f);
  if (op.channels_last) {
    for (const Pixels& p : others) {
      int64_t c = 0;
      for (; c + kPiece <= channels; c += kPiece) {
        vf v[kPiece];                                         // piece b of v[j]: channels c.. of lane b * kPiece + j
        for (int j = 0; j < kPiece; ++j)
          v[j] = gather_pieces<kLanes>(0, [&](int b) { return widen<kPiece>(x + p.at[b * kPiece + j] + c); });
        transpose_pieces(v);
        for (int j = 0; j < kPiece; ++j) store_raw(p.out + at(c + j), v[j]);
      }
      for (; c < channels; ++c)
        for (int64_t lane = 0; lane < kLanes; ++lane) p.out[at(c) + lane] = widen1(x + p.at[lane] + c);
    }
    return;
  }
  // of every second element, twice as many are read: not behind the last of them
  const int64_t elements = (op.batch - image) * channels * pixels;
  for (int64_t c = 0; c < channels; ++c) {
    const X* from = x + c * pixels;
    const int64_t to = at(c), ahead = std::min(kChannelsAhead, channels - 1 - c) * pixels;
    for (const Straight& p : straight)
      for (int64_t i = 0; i < p.vectors * kLanes; i += kLanes) {
        if (i * sizeof(X) % 64 == 0) __builtin_prefetch(from + ahead + p.at + i);
        store_raw(p.out + to + i, widen<kLanes>(from + p.at + i));
      }
    for (const Straight& p : second) {
      __builtin_prefetch(from + ahead + p.at);
      const bool inside = c * pixels + p.at + 2 * kLanes <= elements;
      const vf low = widen<kLanes>(from + p.at), high = widen<kLanes>(from + p.at + (inside ? kLanes : kLanes - 1));
      store_raw(p.out + to, inside ? every_second<0>(low, high) : every_second<1>(low, high));
    }
    for (const Pixels& p : others)
      for (int64_t lane = 0; lane < kLanes; ++lane) p.out[to + lane] = widen1(from + p.at[lane]);
  }
}

}  // namespace

int64_t pack_floats(const Geometry& geometry) {
  const Layout& l = geometry.layout;
  const int64_t channels = l.packed_channels(geometry.shape);
  return l.pointwise ? channels * l.channel * l.unit_tiles : channels * (l.channel + 1);
}

void pack(const Op& op, int64_t image, int64_t unit, Range tiles, Range outputs, float* planes) {
  if (!op.geometry->layout.pointwise) return weave(op, image, unit, outputs, planes);
  with_dtype(op.x_type, [&](auto zero) { pack_pixels<decltype(zero)>(op, image, tiles, planes); });
}

}  // namespace fanin::conv::bytesN
