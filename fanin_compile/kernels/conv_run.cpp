// One unit of tiles: x packed, then block by block and chunk by chunk through the microkernel.
#include <algorithm>
#include <bit>
#include <limits>

#include "conv_parts.h"
#include "conv_kernel.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv::FANIN_WIDTH {
namespace {

// The lanes of a tile in y. If they are consecutive elements, the lanes of its last vector that there are, or else none.
int64_t places_of(const Op& op, int64_t image, int64_t band, const Tile& tile, Places& places) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t pixels = s.pixels_out(), step = op.channels_last ? s.out_channels : 1;
  const int64_t images = std::min(l.images, op.batch - image), begin = image * s.out_channels * pixels;
  places.channel = op.channels_last ? 1 : pixels;
  if (!l.pointwise) {
    int64_t lane = 0;
    for (int64_t i = 0; i < l.images; ++i)
      for (int64_t down = 0; down < l.blocks[1]; ++down)
        for (int64_t across = 0; across < l.blocks[2]; ++across, ++lane)
          for (int part = 0; part < tile.parts; ++part) {
            const int64_t y = band * l.outputs(s, 1) + l.start(s, 1, down) + tile.y + part, x = l.start(s, 2, across) + tile.x;
            const int64_t pixel = (tile.z * s.out[1] + y) * s.out[2] + x, at = begin + i * s.out_channels * pixels + pixel * step;
            for (int t = 0; t < tile.vectors; ++t) places.at[part * tile.vectors + t][lane] = i < images ? at + t * step : -1;
          }
    return 0;
  }
  bool straight = step == 1 || s.out_channels == 1;
  int64_t lanes = 0;
  int64_t i = tile.x * kLanes / pixels, pixel = tile.x * kLanes % pixels;
  for (int t = 0; t < tile.vectors; ++t)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      places.at[t][lane] = i < images ? begin + i * s.out_channels * pixels + pixel * step : -1;
      if (i < images) ++lanes, straight = straight && places.at[t][lane] == places.at[0][0] + t * kLanes + lane;
      if (++pixel == pixels) pixel = 0, ++i;
    }
  return straight ? lanes - (tile.vectors - 1) * kLanes : 0;
}

// ---- what a stage stores, made ready -------------------------------------------------------------------------------------

constexpr int kTableTaps = 16;                  // most taps whose offsets are looked up in registers

// Codes, channel << bits | tap, to bytes from the chunk's first channel.
class Decoder {
 public:
  Decoder(const Layout& l, int64_t taps)
      : bits_(std::bit_width(static_cast<uint64_t>(taps - 1))), channel_(static_cast<uint32_t>(l.channel / kLanes)),
        fast_(taps <= kTableTaps && l.chunk * channel_ <= UINT16_MAX), taps_(l.taps.data()) {
    for (int64_t t = 0; fast_ && t < taps; ++t)
      low_[t] = static_cast<uint8_t>(taps_[t]), high_[t] = static_cast<uint8_t>(taps_[t] >> 8);
  }

  void operator()(const uint16_t* codes, int64_t count, uint32_t* out) const {
    int64_t i = 0;
#if defined(__AVX2__)
    if (fast_) {
      const auto repeat = [](const uint8_t* p) { return _mm256_broadcastsi128_si256(load_raw<__m128i>(p)); };
      const auto each = [](int number) { return _mm256_set1_epi16(static_cast<int16_t>(number)); };
      const __m256i low = repeat(low_), high = repeat(high_), channel = each(static_cast<int>(channel_));
      const __m256i tap = each((1 << bits_) - 1), not_high = each(0x8000), not_low = each(0x80);
      const __m128i bits = _mm_cvtsi32_si128(bits_);
      for (; i + 16 <= count; i += 16) {
        const __m256i code = load_raw<__m256i>(codes + i), t = _mm256_and_si256(code, tap);
        // each half of a tap's offset is looked up where it belongs; bytes with their highest bit set give 0
        const __m256i offset = _mm256_or_si256(_mm256_shuffle_epi8(low, _mm256_or_si256(t, not_high)),
                                               _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(t, 8), not_low)));
        const __m256i vectors = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_srl_epi16(code, bits), channel), offset);
        const auto put = [&](uint32_t* to, __m128i half) {
          using U = Vec<uint32_t, 8>;
          store_raw(to, (U)_mm256_cvtepu16_epi32(half) * uint32_t{sizeof(vf)});
        };
        put(out + i, _mm256_castsi256_si128(vectors));
        put(out + i + 8, _mm256_extracti128_si256(vectors, 1));
      }
    }
#endif
    const uint32_t tap = (1u << bits_) - 1;
    for (; i < count; ++i) out[i] = ((codes[i] >> bits_) * channel_ + taps_[codes[i] & tap]) * uint32_t{sizeof(vf)};
  }

 private:
  int bits_;
  uint32_t channel_;            // vectors
  bool fast_;                   // 16 bits are enough
  const uint32_t* taps_;
  uint8_t low_[kTableTaps] = {}, high_[kTableTaps] = {};
};

void widen_values(const Op& op, int64_t entry, int64_t count, float* out) {
  with_dtype(op.value_type, [&](auto zero) {
    const auto* values = static_cast<const decltype(zero)*>(op.values) + entry;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_raw(out + i, widen<kLanes>(values + i));
    for (; i < count; ++i) out[i] = widen1(values + i);
  });
}

// What run() keeps in its scratch, in floats; each part begins at a cache line.
struct Parts {
  int64_t values, offsets, planes, end;         // the sums of a block come first

  explicit Parts(const Op& op) {
    const auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    const Structure& w = *op.weight;
    values = lines(w.tallest() * kMaxTile * kLanes);
    offsets = values + (op.value_type == DType::f32 ? 0 : lines(w.longest));
    planes = offsets + (w.together > 1 ? 0 : lines(w.longest + 2));          // two more are read
    end = planes + pack_floats(*op.geometry);
  }
};

}  // namespace

int64_t scratch_floats(const Op& op) { return Parts(op).end; }

namespace {

// A part of the rows of these tiles, counted from their first on.
struct Rows {
  int64_t first, last;

  Range of(const Tile& tile, int64_t before) const {            // of a tile's parts, with so many rows before it
    return {std::clamp<int64_t>(first - before, 0, tile.parts), std::clamp<int64_t>(last - before, 0, tile.parts)};
  }
};

// The rows of outputs that they stand in, numbered as in Weave::Row.
Range outputs_of(const Layout& l, Range tiles, Rows rows) {
  Range outputs{std::numeric_limits<int64_t>::max(), 0};
  for (int64_t i = tiles.first, before = 0; i < tiles.last; before += l.tiles[i++].parts) {
    const auto [from, to] = rows.of(l.tiles[i], before);
    const int64_t row = l.at(l.tiles[i]) / l.pitch;
    if (from < to) outputs = {std::min(outputs.first, row + from), std::max(outputs.last, row + to)};
  }
  return outputs;
}

}  // namespace

void run(const Op& op, int64_t image, int64_t unit, Part part, float* scratch) {
  const Structure& w = *op.weight;
  const Layout& l = op.geometry->layout;
  const auto cut = [&](int64_t count, int64_t at) { return count * at / part.parts; };
  const bool by_block = l.by_block(w.blocks);
  const int64_t first_block = by_block ? cut(w.blocks, part.part) : 0, last_block = by_block ? cut(w.blocks, part.part + 1) : w.blocks;
  // otherwise threads share the rows of all tiles
  const int64_t count = l.rows_in(unit);
  Rows rows{by_block ? 0 : cut(count, part.part), by_block ? count : cut(count, part.part + 1)};
  if (first_block == last_block || rows.first == rows.last) return;
  Range tiles = l.tiles_of(unit);
  if (l.pointwise) {            // a tile is a row, and packed by itself
    tiles = {tiles.first + rows.first, tiles.first + rows.last};
    rows = {0, tiles.last - tiles.first};
  }
  const Tile *first = l.tiles.data() + tiles.first, *last = l.tiles.data() + tiles.last;
  const Parts parts(op);
  float *sums = scratch, *widened = scratch + parts.values, *planes = scratch + parts.planes;
  uint32_t* decoded = reinterpret_cast<uint32_t*>(scratch + parts.offsets);
  pack(op, image, unit, tiles, outputs_of(l, tiles, rows), planes);

  Places places;
  Target target{};
  target.bias = static_cast<const float*>(op.bias);
  target.pixels = op.geometry->shape.pixels_out();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  target.floor = op.act == Act::none ? -infinity : 0.0f;
  target.ceiling = op.act == Act::relu6 ? 6.0f : infinity;
  const bool simple = op.x_type == DType::f32 && (!op.bias || op.bias_type == DType::f32) &&
                      (op.act == Act::none || op.act == Act::relu || op.act == Act::relu6);
  const Decoder decode(l, w.taps);
  const int64_t chunks = w.chunks(), tile_step = l.packed_channels(op.geometry->shape) * l.channel;
  int64_t before = 0;
  bool request = true;          // later tiles find the weights in L2, mostly
  for (const Tile* whole = first; whole < last; before += whole->parts, ++whole) {
    const auto [from, to] = rows.of(*whole, before);
    if (from == to) continue;
    const Tile tile{whole->z, whole->y + from, whole->x, static_cast<int>(to - from), whole->vectors};
    target.lanes = places_of(op, image, l.band_of(unit), tile, places);
    const bool finished = target.lanes > 0 && simple;
    target.y = static_cast<float*>(op.y) + places.at[0][0];
    target.residual = op.residual ? static_cast<const float*>(op.residual) + places.at[0][0] : nullptr;
    const float* x = planes + (l.pointwise ? (whole - first) * tile_step : (l.at(tile) - l.at(*first) / l.pitch * l.pitch) * kLanes);
    const Kernel accumulate = kernel(tile, l);
    for (int64_t block = first_block; block < last_block; ++block) {
      target.live = w.rows() + w.first_row(block);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Stage* stage = w.stages() + block * chunks + chunk;
        const int64_t entry = stage->entry, count = stage[1].entry - entry;
        if (count == 0) continue;
        Runs runs{};
        runs.count = w.counts() + stage->visit[0], runs.rows = w.order() + stage->visit[0] * l.together;
        runs.x = x + chunk * l.chunk_channels() * l.channel, runs.sums = sums;
        runs.gap = l.pitch * int64_t{sizeof(vf)};
        runs.offsets = w.codes() + entry, runs.last = w.codes() + w.entries - 4;
        if (l.together == 1) decode(w.codes() + entry, count, decoded), runs.offsets = decoded;
        runs.values = static_cast<const float*>(op.values) + entry;
        if (op.value_type != DType::f32) widen_values(op, entry, count, widened), runs.values = widened;
        runs.request = request, runs.codes = w.codes() + entry + count;
        for (int kind = 0; kind < 4; ++kind) {
          runs.end = w.counts() + (kind < 3 ? stage->visit[kind + 1] : stage[1].visit[0]);
          runs.fresh = kind < 2;
          runs.target = finished && (kind == 0 || kind == 3) ? &target : nullptr;
          accumulate(runs);
        }
      }
      if (!finished) store(op, tile, places, sums, w.first_row(block), w.first_row(block + 1));
    }
    request = false;
  }
}

namespace {
constexpr Kernels kKernels{kLanes, make_layout, scratch_floats, run, run_dead};
}  // namespace
}  // namespace fanin::conv::bytesN

namespace fanin::conv {
#if defined(FANIN_HALVED)
const Kernels* half_kernels() { return &kKernels; }
#else
const Kernels& whole_kernels() { return kKernels; }
#endif
}  // namespace fanin::conv
