// Copies x to where the kernel reads it: zero-padded blocks in the lanes, or compact tiles of pixels.
#include <algorithm>

#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

constexpr int64_t kChannelsAhead = 3;           // channels lie far apart: their pixels are requested early

// ---- spatial -----------------------------------------------------------------------------------------------------------

// A row of all blocks, in one phase of z and y: kLanes rows of pixels become vectors, the columns of all phases of x.
struct Row {
  int64_t kind;                 // of its columns: which phase of z and y
  int64_t out;                  // floats to its first vector
  int64_t pixel[kLanes];        // start of each lane's row in the image, or -1: zeros
};

// Where the vector of a column goes.
struct Column {
  vi inside;                    // lanes in which it is not padding
  int64_t out;                  // floats, or -1: no tap asks for its phase
};

struct Weave {
  int64_t width;                // columns of a block, rounded up to pieces
  int64_t stored;               // those of a row of the image, where rows are copied with their padding
  int64_t first;                // column of the image where the first block starts, negative in padding
  std::vector<Row> rows;
  std::vector<Column> columns;  // [kinds][width]
  int64_t image[kLanes], block[kLanes];         // of each lane: the image, and its first column after `first`
};

int64_t width_of(const Geometry& g) { return (g.layout.pitch * g.shape.stride[2] + kPiece - 1) / kPiece * kPiece; }
int64_t stored_of(const Geometry& g) {
  return g.layout.start(g.shape, 2, g.layout.blocks[2] - 1) * g.shape.stride[2] + width_of(g);
}

Weave weave_of(const Geometry& geometry, int64_t unit) {
  const Shape& s = geometry.shape;
  const Layout& l = geometry.layout;
  Weave w{};
  w.width = width_of(geometry), w.stored = stored_of(geometry);
  w.first = l.low[2] * s.stride[2];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    w.image[lane] = lane / (l.blocks[1] * l.blocks[2]);
    w.block[lane] = l.start(s, 2, lane % l.blocks[2]) * s.stride[2];
  }
  const int64_t first = l.at(l.tiles[l.unit[unit]]) / l.pitch;
  int64_t last = first;
  for (int64_t i = l.unit[unit]; i < l.unit[unit + 1]; ++i)
    last = std::max(last, (l.stop(l.tiles[i]) + l.span + l.pitch - 1) / l.pitch);

  std::vector<std::array<int64_t, 2>> kinds;
  for (const Dims& phase : l.phases)
    if (const std::array<int64_t, 2> kind{phase[0], phase[1]}; std::find(kinds.begin(), kinds.end(), kind) == kinds.end())
      kinds.push_back(kind);
  for (size_t k = 0; k < kinds.size(); ++k) {
    for (int64_t q = 0; q < w.width; ++q) {
      const Dims phase{kinds[k][0], kinds[k][1], q % s.stride[2]};
      const auto found = std::find(l.phases.begin(), l.phases.end(), phase);
      Column column{vi{}, -1};
      if (found != l.phases.end() && q / s.stride[2] < l.pitch)
        column.out = (found - l.phases.begin()) * l.plane + q / s.stride[2] * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t at = w.first + w.block[lane] + q;
        column.inside[lane] = at >= 0 && at < s.in[2] ? -1 : 0;
      }
      w.columns.push_back(column);
    }
    for (int64_t r = first; r < last; ++r) {
      Row row{static_cast<int64_t>(k), (r - first) * l.pitch * kLanes, {}};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t y = l.start(s, 1, lane / l.blocks[2] % l.blocks[1]) + r % l.rows;
        const int64_t iz = (r / l.rows + l.low[0]) * s.stride[0] + kinds[k][0], iy = (y + l.low[1]) * s.stride[1] + kinds[k][1];
        const bool inside = iz >= 0 && iz < s.in[0] && iy >= 0 && iy < s.in[1];
        row.pixel[lane] = inside ? (iz * s.in[1] + iy) * s.in[2] : -1;
      }
      w.rows.push_back(row);
    }
  }
  return w;
}

// lane[i]: the first column of lane i's block.
template <class X>
FANIN_INLINE void weave_row(const Weave& w, const Row& row, const X* const (&lane)[kLanes], float* out) {
  const Column* column = w.columns.data() + row.kind * w.width;
  for (int64_t q = 0; q < w.width; q += kPiece, column += kPiece) {
    vf v[kPiece];                                             // piece b of v[j]: columns q.. of lane b * kPiece + j
    for (int j = 0; j < kPiece; ++j)
      v[j] = gather_pieces<kLanes>(0, [&](int b) { return widen<kPiece>(lane[b * kPiece + j] + q); });
    transpose_pieces(v);
    for (int j = 0; j < kPiece; ++j)
      if (column[j].out >= 0) store_raw(out + row.out + column[j].out, keep<kLanes>(column[j].inside, v[j]));
  }
}

// One channel by way of padded rows: where weaving in place would leave x.
template <class X>
void pack_rows(const Op& op, int64_t image, const Weave& w, int64_t c, float* planes, float* rows) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t pixels = s.pixels_in(), begin = std::max<int64_t>(0, w.first), end = std::min(s.in[2], w.first + w.stored);
  const X* x = static_cast<const X*>(op.x);
  for (const Row& row : w.rows) {
    std::fill(rows, rows + kLanes * w.stored, 0.0f);
    for (int64_t lane = 0; lane < kLanes; lane += l.blocks[2]) {
      const int64_t i = image + w.image[lane];
      if (i >= op.batch || row.pixel[lane] < 0) continue;
      const X* from = x + (i * s.in_channels + c) * pixels + row.pixel[lane] + begin;
      float* to = rows + lane * w.stored + begin - w.first;
      for (int64_t j = 0; j < end - begin; ++j) to[j] = widen1(from + j);
    }
    const float* lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = rows + lane / l.blocks[2] * l.blocks[2] * w.stored + w.block[lane];
    weave_row(w, row, lanes, planes);
  }
}

// x[pixel][channel]: a vector's lanes are gathered kPiece channels at a time, which the transposes tell apart.
template <class X>
void pack_channels_last(const Op& op, int64_t image, const Weave& w, float* planes, float* zeros) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t channels = s.in_channels, pixels = s.pixels_in();
  const X* x = static_cast<const X*>(op.x);
  std::fill_n(zeros, channels, 0.0f);
  for (const Row& row : w.rows) {
    const Column* column = w.columns.data() + row.kind * w.width;
    for (int64_t q = 0; q < w.width; ++q) {
      if (column[q].out < 0) continue;
      const X* lanes[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t i = image + w.image[lane];
        const bool inside = column[q].inside[lane] != 0 && row.pixel[lane] >= 0 && i < op.batch;
        lanes[lane] = inside ? x + (i * pixels + row.pixel[lane] + w.first + w.block[lane] + q) * channels
                             : reinterpret_cast<const X*>(zeros);
      }
      float* out = planes + row.out + column[q].out;
      int64_t c = 0;
      for (; c + kPiece <= channels; c += kPiece) {
        vf v[kPiece];                                         // piece b of v[j]: channels c.. of lane b * kPiece + j
        for (int j = 0; j < kPiece; ++j)
          v[j] = gather_pieces<kLanes>(0, [&](int b) { return widen<kPiece>(lanes[b * kPiece + j] + c); });
        transpose_pieces(v);
        for (int j = 0; j < kPiece; ++j) store_raw(out + (c + j) * l.channel, v[j]);
      }
      for (; c < channels; ++c)
        for (int64_t lane = 0; lane < kLanes; ++lane) out[c * l.channel + lane] = widen1(lanes[lane] + c);
    }
  }
}

template <class X>
void pack_spatial(const Op& op, int64_t image, int64_t unit, float* planes, float* rows) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const Weave w = weave_of(*op.geometry, unit);
  const int64_t channels = s.in_channels, pixels = s.pixels_in(), size = op.batch * channels * pixels;
  if (op.channels_last) return pack_channels_last<X>(op, image, w, planes, rows);
  constexpr int64_t line = 64 / sizeof(X);
  // of channel 0: elements at which lanes start, and one of each cache line
  std::vector<int64_t> starts, lines;
  int64_t least = size, most = 0;
  for (const Row& row : w.rows)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool inside = row.pixel[lane] >= 0 && image + w.image[lane] < op.batch;
      const int64_t at = (image + w.image[lane]) * channels * pixels + row.pixel[lane] + w.first + w.block[lane];
      starts.push_back(inside ? at : -size);
      if (!inside) continue;
      least = std::min(least, at), most = std::max(most, at + w.width);
      for (int64_t i = at / line; i <= (at + w.width - 1) / line; ++i) lines.push_back(i * line);
    }
  std::sort(lines.begin(), lines.end());
  lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
  std::fill(rows, rows + w.width, 0.0f);
  for (int64_t c = 0; c < channels; ++c, planes += l.channel) {
    if (least + c * pixels < 0 || most + c * pixels > size) {
      pack_rows<X>(op, image, w, c, planes, rows + w.width);
      continue;
    }
    const X *x = static_cast<const X*>(op.x) + c * pixels, *zeros = reinterpret_cast<const X*>(rows);
    const int64_t ahead = std::min(kChannelsAhead, channels - 1 - c) * pixels;
    for (const int64_t at : lines) __builtin_prefetch(x + ahead + at);
    const int64_t* start = starts.data();
    for (const Row& row : w.rows) {
      const X* lanes[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane, ++start) lanes[lane] = *start == -size ? zeros : x + *start;
      weave_row(w, row, lanes, planes);
    }
  }
}

// ---- pointwise ---------------------------------------------------------------------------------------------------------

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
  if (l.pointwise) return channels * l.channel * l.unit_tiles;
  return channels * l.channel + std::max(width_of(geometry) + kLanes * stored_of(geometry), channels);
}

void pack(const Op& op, int64_t image, int64_t unit, float* planes) {
  with_dtype(op.x_type, [&](auto zero) {
    using X = decltype(zero);
    const Geometry& g = *op.geometry;
    if (g.layout.pointwise) return pack_pixels<X>(op, image, unit, planes);
    pack_spatial<X>(op, image, unit, planes, planes + g.shape.in_channels * g.layout.channel);
  });
}

}  // namespace fanin::conv
