// Chooses how a convolution is cut: blocks for the lanes, tiles, units and chunks. Derivations: CONV.md.
#include <algorithm>
#include <limits>

#include "conv_parts.h"

namespace fanin::conv::FANIN_WIDTH {
namespace {

// Of x packed at a time: with the sums of a block it stays in L2. What is packed goes through L2 as it is read, too, so that units
// are no larger than they need to be; but each reads all of the weight again.
int64_t unit_bytes(const Structure& w) {
  constexpr int64_t kEnough = 640 << 10, kEntry = sizeof(float) + sizeof(uint16_t);
  return std::min(l2_bytes() / 8 * 5, std::max(kEnough, w.entries * kEntry));
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tap at distance e = k * dilation - padding from the first input of its output is e = shift * stride + phase.
struct Step {
  int64_t shift, phase;
};
Step step(const Shape& s, int d, int64_t k) {
  const int64_t e = k * s.dilation[d] - s.padding[d], shift = floor_div(e, s.stride[d]);
  return {shift, e - shift * s.stride[d]};
}

// Most vectors in a row of a tile, and rows, of blocks [height, width]: at most half of the vectors in one row where there
// are two, so that a tile reads as much of a channel as the weight's chunks were made for.
int64_t tile_vectors(const Dims& block) {
  return ceil_div(block[2], ceil_div(block[2], block[1] > 1 ? kMaxTile / 2 : kMaxTile));
}
int64_t tile_parts(const Dims& block) {
  return std::clamp<int64_t>(kMaxTile / tile_vectors(block), 1, std::min<int64_t>(kMaxParts, block[1]));
}

// Cycles that a vector takes to be packed (transposes into the lanes) and stored, and what a run takes beside its FMAs.
constexpr double kPacking = 9, kStoring = 11, kRun = 20;
constexpr double kScattering = 2 * kLanes;      // stored lane by lane, where a tile's rows are too short to be transposed
constexpr double kProduct = kLanes > 8 ? 0.7 : 0.5;           // FMAs that load 64 bytes do not run at two a cycle
// More, of a packed vector, where a unit is half as large again as it should be to stay in L2, up to what memory takes.
constexpr double kFar = 6, kFarthest = 5;

// Cycles that an image takes, roughly: what ranks the ways to spread blocks over lanes.
double cost(const Structure& w, const Shape& s, const Layout& l, const Dims& span) {
  const int64_t parts = tile_parts(l.block), phases = static_cast<int64_t>(l.phases.size());
  const int64_t tiles = l.block[0] * ceil_div(l.block[1], parts) * ceil_div(l.block[2], tile_vectors(l.block));
  const double outputs = static_cast<double>(l.block[0] * l.block[1] * l.block[2]);
  const double tile = outputs / static_cast<double>(tiles);
  // loads limit products, and a chain takes four cycles for each link; a run loads and stores its sums and ends by surprise
  const double run = std::max(4.0, kProduct * tile + 0.6) * w.fan_in() + (1.5 * tile + kRun) * static_cast<double>(l.chunks(s));
  const double storing = tile_vectors(l.block) < kPiece ? kScattering : kStoring;
  // rows of outputs in a unit: the inputs between it and the next one are packed twice
  const int64_t row = l.pitch * kLanes * phases * s.in_channels * int64_t{sizeof(float)};
  const int64_t rows = std::min(std::max(unit_bytes(w) / row - span[1], parts), l.block[1]);
  const double beyond = static_cast<double>((rows + span[1]) * row) / (1.5 * static_cast<double>(unit_bytes(w)));
  // without a step, which would rank what is a little above it behind what is a little below
  const double far = beyond < 1.0 ? std::max(0.0, 3.0 * beyond - 2.0) : std::min(beyond, kFarthest);
  const double packing = kPacking + kFar * far;
  const double packed = static_cast<double>((l.block[0] + span[0]) * l.pitch * phases) *
                        static_cast<double>(ceil_div(l.block[1], rows) * (rows + span[1]));
  return (static_cast<double>(s.out_channels) * (static_cast<double>(tiles) * run + storing * outputs) +
          static_cast<double>(s.in_channels) * packing * packed) /
         static_cast<double>(l.images);
}

// Sets what follows from images and blocks.
void place(const Shape& s, const Dims& span, Layout& l) {
  for (int d = 0; d < 3; ++d) l.block[d] = ceil_div(l.outputs(s, d), l.blocks[d]);
  l.rows = l.block[1] + span[1];
  l.pitch = l.block[2] + span[2];
}

// even: an even number of them, where several are odd, so that two threads have as many rows.
void cut_tiles(Layout& l, bool even) {
  const int64_t parts = tile_parts(l.block), across = ceil_div(l.block[2], tile_vectors(l.block));
  int64_t down = ceil_div(l.block[1], parts);
  if (even && down > 1 && l.block[0] * across * down % 2 != 0 && down < l.block[1]) ++down;
  for (int64_t z = 0; z < l.block[0]; ++z)
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < across; ++j) {
        const int64_t y = i * l.block[1] / down, x = j * l.block[2] / across;
        l.tiles.push_back({z, y, x, static_cast<int>((i + 1) * l.block[1] / down - y),
                           static_cast<int>((j + 1) * l.block[2] / across - x)});
      }
}

// As few units as there can be of at most `bytes`, as packed(tiles) tells, of about equal size and whole rows of `across` tiles. Where those do not
// come out even and threads share them, units end within rows, which are packed twice.
template <class F>
void cut_units(Layout& l, int64_t across, bool shared, int64_t bytes, const F& packed) {
  const int64_t rows = static_cast<int64_t>(l.tiles.size()) / across;
  int64_t most = 1;
  while (most < rows && packed((most + 1) * across) <= bytes) ++most;
  const int64_t units = ceil_div(rows, most);
  const int64_t step = shared && rows % units != 0 ? 1 : across;
  for (int64_t u = 0; u <= units; ++u) l.unit.push_back(u * (rows * across / step) / units * step);
  l.unit_tiles = l.unit_rows = 0;
  for (int64_t u = 0; u < units; ++u) {
    l.unit_tiles = std::max(l.unit_tiles, l.unit[u + 1] - l.unit[u]);
    l.unit_rows = std::max(l.unit_rows, l.rows_in(u));
  }
}

// A thread's rows lie together, as its pixels of pointwise layers do: few lines of x and y are another core's. Not where threads
// share blocks of rows of the weight, nor where a band would be all halo.
int64_t bands(const Structure& w, const Shape& s) {
  constexpr int64_t kLeastRows = 4;
  return w.blocks == 1 && s.out[1] % s.sharers == 0 && s.out[1] >= kLeastRows * s.sharers ? s.sharers : 1;
}

bool make_spatial(const Structure& w, const Shape& s, Layout& l) {
  l.bands = bands(w, s);
  const bool shared = s.sharers > 1 && l.bands == 1;
  Dims span;
  for (int d = 0; d < 3; ++d) {
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    for (int64_t k = 0; k < s.kernel[d]; ++k) {
      low = std::min(low, step(s, d, k).shift);
      high = std::max(high, step(s, d, k).shift);
    }
    l.low[d] = low, span[d] = high - low;
  }
  std::vector<Dims> shifts;
  std::vector<int64_t> phase_of, taps;
  for (int64_t t = 0; t < s.taps(); ++t) {
    const Dims k{t / (s.kernel[1] * s.kernel[2]), t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
    Dims phase, shift;
    for (int d = 0; d < 3; ++d) shift[d] = step(s, d, k[d]).shift - l.low[d], phase[d] = step(s, d, k[d]).phase;
    const auto found = std::find(l.phases.begin(), l.phases.end(), phase);
    phase_of.push_back(found - l.phases.begin());
    if (found == l.phases.end()) l.phases.push_back(phase);
    shifts.push_back(shift);
  }

  double least = std::numeric_limits<double>::infinity();
  Layout best = l;
  for (int64_t images = 1; images <= std::min<int64_t>(s.images, kLanes); images *= 2)
    for (int64_t across = 1; images * across <= kLanes; across *= 2) {
      l.images = images;
      l.blocks = {1, kLanes / (images * across), across};
      place(s, span, l);
      if (const double cycles = cost(w, s, l, span); cycles < least) least = cycles, best = l;
    }
  l = best;

  for (const Dims& shift : shifts) {
    taps.push_back((shift[0] * l.rows + shift[1]) * l.pitch + shift[2]);
    l.span = std::max(l.span, taps.back());
  }
  cut_tiles(l, shared && w.blocks == 1);
  const int64_t phases = static_cast<int64_t>(l.phases.size());
  const auto floats = [&](int64_t first, int64_t last) {      // whole rows of one phase
    int64_t stop = 0;
    for (int64_t i = first; i < last; ++i) stop = std::max(stop, l.stop(l.tiles[i]));
    return (ceil_div(stop + l.span, l.pitch) - l.at(l.tiles[first]) / l.pitch) * l.pitch * kLanes;
  };
  cut_units(l, ceil_div(l.block[2], tile_vectors(l.block)), shared, unit_bytes(w), [&](int64_t tiles) {
    return floats(0, tiles) * phases * s.in_channels * int64_t{sizeof(float)};
  });
  for (size_t u = 0; u + 1 < l.unit.size(); ++u) l.plane = std::max(l.plane, floats(l.unit[u], l.unit[u + 1]));
  // an odd number of cache lines, so that channels spread over all sets of L1
  l.channel = ceil_div(l.plane * phases, kLine) * kLine;
  if (l.channel / kLine % 2 == 0) l.channel += kLine;
  if (l.chunk * l.channel > int64_t{UINT32_MAX} / static_cast<int64_t>(sizeof(float))) return false;
  for (size_t t = 0; t < taps.size(); ++t) l.taps.push_back(static_cast<uint32_t>(phase_of[t] * l.plane / kLanes + taps[t]));
  make_weaves(s, l);
  return true;
}

void make_pointwise(const Structure& w, const Shape& s, Layout& l) {
  const int64_t pixels = s.pixels_out();
  l.bands = 1, l.blocks = {1, 1, 1}, l.block = s.out;
  l.pitch = l.rows = 1;
  l.phases = {Dims{}}, l.taps = {0};
  l.images = pixels % kLanes == 0 || pixels >= 16 * kLanes ? 1 : std::min<int64_t>(s.images, kLanes);
  const int64_t vectors = ceil_div(l.images * pixels, kLanes), most = l.together == 1 ? kMaxTile : kNarrow;
  const int64_t tiles = ceil_div(vectors, most);
  // the larger ones first: of an odd number, the half with one more has no more vectors than it must
  const auto at = [&](int64_t i) { return i * (vectors / tiles) + std::min(i, vectors % tiles); };
  for (int64_t i = 0; i < tiles; ++i) l.tiles.push_back({0, 0, at(i), 1, static_cast<int>(at(i + 1) - at(i))});
  l.plane = l.channel = (l.together == 1 ? std::min(vectors, most) : most) * kLanes;        // codes count by it
  cut_units(l, 1, s.sharers > 1, unit_bytes(w),
            [&](int64_t count) { return count * s.in_channels * l.channel * int64_t{sizeof(float)}; });
}

}  // namespace

bool make_layout(const Structure& w, const Shape& s, Layout& l) {
  l = Layout{};
  l.chunk = w.chunk, l.together = static_cast<int>(w.together), l.cheap_loads = loads_are_cheap();
  l.pointwise = s.pointwise();
  if (!l.pointwise) return l.together == 1 && make_spatial(w, s, l);
  make_pointwise(w, s, l);
  return true;
}

}  // namespace fanin::conv::bytesN
