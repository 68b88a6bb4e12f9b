// Chooses the numbering of positions, the tiles and the chunks of a convolution. Derivations: CONV.md.
#include <algorithm>
#include <limits>

#include "conv.h"
#include "vec.h"

namespace fanin::conv {
namespace {

constexpr int64_t kChunkBytes = 28 << 10;       // x of one chunk and tile: with the sums of a row it stays in L1
constexpr int64_t kPointwiseBytes = 56 << 10;   // a pointwise chunk has too few non-zeros a row for that: it stays in L2
constexpr int64_t kUnitBytes = 320 << 10;       // x packed at a time: with the sums of a block it stays in L2

constexpr int64_t kLine = 64 / sizeof(float);

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Axis {
  int64_t halo = 0, behind = 0, count = 0;      // zeros before and after the pixels of a phase; pixels of the largest phase
};

// A tap at distance e = k * dilation - padding from the first input of its output is e = shift * stride + phase.
Axis axis(const Shape& s, int d) {
  Axis a;
  for (int64_t k = 0; k < s.kernel[d]; ++k) {
    const int64_t shift = floor_div(k * s.dilation[d] - s.padding[d], s.stride[d]);
    const int64_t phase = k * s.dilation[d] - s.padding[d] - shift * s.stride[d];
    const int64_t count = std::max<int64_t>(0, ceil_div(s.in[d] - phase, s.stride[d]));
    a.halo = std::max(a.halo, -shift);
    a.behind = std::max(a.behind, s.out[d] - 1 + shift - (count - 1));
    a.count = std::max(a.count, count);
  }
  return a;
}

}  // namespace

Shape flatten_pointwise(const Shape& s) {
  constexpr Dims ones{1, 1, 1}, none{0, 0, 0};
  if (s.kernel != ones || s.stride != ones || s.padding != none) return s;
  Shape flat = s;
  flat.in = flat.out = {1, 1, s.pixels_out()};
  flat.dilation = ones;
  return flat;
}

int64_t Layout::first(int64_t tile) const { return tile * ceil_div(lanes, kLanes) / tiles; }

bool make_layout(const Shape& s, Layout& l) {
  const Axis z = axis(s, 0), y = axis(s, 1), x = axis(s, 2);
  l = Layout{};
  l.halo = {z.halo, y.halo, x.halo};
  l.pitch = std::max(s.out[2], x.count + std::max(x.halo, x.behind));
  l.rows = std::max(s.out[1], y.count + std::max(y.halo, y.behind));
  l.lanes = ((s.out[0] - 1) * l.rows + s.out[1] - 1) * l.pitch + s.out[2];

  int64_t high = std::numeric_limits<int64_t>::min();
  l.low = std::numeric_limits<int64_t>::max();
  for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
    for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
        const Dims k{kz, ky, kx};
        Dims shift, phase;
        for (int d = 0; d < 3; ++d) {
          const int64_t e = k[d] * s.dilation[d] - s.padding[d];
          shift[d] = floor_div(e, s.stride[d]);
          phase[d] = e - shift[d] * s.stride[d];
        }
        const auto same = [&](const Phase& p) { return p.at == phase; };
        const auto found = std::find_if(l.phases.begin(), l.phases.end(), same);
        l.tap_phase.push_back(static_cast<int32_t>(found - l.phases.begin()));
        if (found == l.phases.end()) l.phases.push_back({phase});
        l.tap.push_back((shift[0] * l.rows + shift[1]) * l.pitch + shift[2]);
        l.low = std::min(l.low, l.tap.back());
        high = std::max(high, l.tap.back());
      }
  l.span = high - l.low;

  l.pointwise = s.taps() == 1 && s.in == s.out && l.lanes == s.pixels_out();
  const int64_t vectors = ceil_div(l.lanes, kLanes);
  l.images = s.paired && vectors <= kMaxTile / 2 ? 2 : 1;
  l.tiles = ceil_div(vectors, kMaxTile);
  const int64_t width = ceil_div(vectors, l.tiles) * kLanes, phases = static_cast<int64_t>(l.phases.size());
  const auto packed = [&](int64_t tiles) { return (ceil_div(tiles * width + l.span, kLanes) + 1) * kLanes * phases; };
  l.tiles_per_unit = 1;
  while (l.tiles_per_unit < l.tiles &&
         packed(l.tiles_per_unit + 1) * s.in_channels * l.images * int64_t{sizeof(float)} <= kUnitBytes)
    ++l.tiles_per_unit;
  l.units = ceil_div(l.tiles, l.tiles_per_unit);
  l.tiles_per_unit = ceil_div(l.tiles, l.units);
  l.plane = packed(l.tiles_per_unit) / phases;
  // an odd number of cache lines, so that channels spread over all sets of L1
  l.channel = ceil_div(packed(l.tiles_per_unit), kLine) * kLine;
  if (l.channel / kLine % 2 == 0) l.channel += kLine;
  if (!l.pointwise && l.channel > kMaxOffset) return false;

  const int64_t bytes = packed(1) * l.images * int64_t{sizeof(float)};
  const int64_t reach = l.pointwise ? kMaxOffset : kMaxOffset / l.channel;
  l.chunk = std::clamp<int64_t>((l.pointwise ? kPointwiseBytes : kChunkBytes) / bytes, 1, std::min(reach, s.in_channels));
  l.chunk = ceil_div(s.in_channels, ceil_div(s.in_channels, l.chunk));
  return true;
}

}  // namespace fanin::conv
