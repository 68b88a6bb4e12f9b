// Copies x to where the kernel reads it; of a pointwise layer, compact tiles of pixels.
#include <algorithm>

#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

// A vector of pixels of channel 0: where they stand, in elements, and where they go.
struct Pixels {
  int64_t at[kLanes];           // beyond the last image: 0
  float* out;
};
struct Straight {
  int64_t at;
  float* out;
};

// Vectors of a unit: those of consecutive elements, of every second one, and others.
struct Gathered {
  std::vector<Straight> straight, second;
  std::vector<Pixels> others;
};

Gathered pixels_of(const Op& op, int64_t image, int64_t unit, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t pixels = s.pixels_in(), outputs = s.pixels_out(), images = std::min(l.images, op.batch - image);
  const int64_t step = op.channels_last ? s.in_channels : 1;
  const int64_t first = l.tiles[l.unit[unit]].x * kLanes;
  Gathered g;
  int64_t i = first / outputs, output = first % outputs;
  for (int64_t tile = l.unit[unit]; tile < l.unit[unit + 1]; ++tile)
    for (int64_t t = 0; t < l.tiles[tile].vectors; ++t) {
      Pixels p{{}, planes + (tile - l.unit[unit]) * l.packed_channels(s) * l.channel + t * kLanes};
      bool consecutive = !op.channels_last, second = consecutive;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t z = output / (s.out[1] * s.out[2]), y = output / s.out[2] % s.out[1], x = output % s.out[2];
        const int64_t pixel = (z * s.stride[0] * s.in[1] + y * s.stride[1]) * s.in[2] + x * s.stride[2];
        if (i < images) p.at[lane] = i * s.in_channels * pixels + pixel * step;
        consecutive = consecutive && i < images && p.at[lane] == p.at[0] + lane;
        second = second && i < images && p.at[lane] == p.at[0] + 2 * lane;
        if (++output == outputs) output = 0, ++i;
      }
      if (consecutive) g.straight.push_back({p.at[0], p.out});
      else if (second) g.second.push_back({p.at[0], p.out});
      else g.others.push_back(p);
    }
  return g;
}

template <class X>
void pack_pixels(const Op& op, int64_t image, int64_t unit, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t channels = s.in_channels, pixels = s.pixels_in(), tiles = l.unit[unit + 1] - l.unit[unit];
  const X* x = static_cast<const X*>(op.x) + image * channels * pixels;
  const auto [straight, second, others] = pixels_of(op, image, unit, planes);
  const auto at = [&](int64_t c) { return (c / l.chunk * l.chunk_channels() + c % l.chunk) * l.channel; };
  if (l.together > 1)
    for (int64_t i = 0; i < tiles; ++i)
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
    for (size_t i = 0; i < straight.size(); i += 64 / (kLanes * sizeof(X))) __builtin_prefetch(from + ahead + straight[i].at);
    for (const Straight& p : straight) store_raw(p.out + to, widen<kLanes>(from + p.at));
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

void pack(const Op& op, int64_t image, int64_t unit, float* planes) {
  if (!op.geometry->layout.pointwise) return weave(op, image, unit, planes);
  with_dtype(op.x_type, [&](auto zero) { pack_pixels<decltype(zero)>(op, image, unit, planes); });
}

}  // namespace fanin::conv
