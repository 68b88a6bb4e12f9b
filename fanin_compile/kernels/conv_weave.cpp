// Packs x of a spatial layer: rows of pixels are woven into vectors, a block for each lane.
#include <algorithm>

#include "conv_parts.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv::FANIN_WIDTH {
namespace {

int64_t image_of(const Layout& l, int64_t lane) { return lane / (l.blocks[1] * l.blocks[2]); }

// What the columns of a row have in common with those of others.
struct Kind {
  std::array<int64_t, 2> phase;                 // of z and y
  uint32_t inside;                              // a bit for each lane whose row of pixels is no padding
  bool operator==(const Kind&) const = default;
};

void make_columns(const Shape& s, const Kind& kind, Layout& l) {
  for (int64_t q = 0; q < l.columns; ++q) {
    const auto found = std::find(l.phases.begin(), l.phases.end(), Dims{kind.phase[0], kind.phase[1], q % s.stride[2]});
    const bool used = found != l.phases.end() && q / s.stride[2] < l.pitch;
    l.column_out.push_back(used ? static_cast<int32_t>((found - l.phases.begin()) * l.plane + q / s.stride[2] * kLanes) : -1);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t x = (l.low[2] + l.start(s, 2, lane % l.blocks[2])) * s.stride[2] + q;
      l.column_inside.push_back((kind.inside >> lane & 1) != 0 && x >= 0 && x < s.in[2] ? -1 : 0);
    }
  }
}

// The rows of pixels, of a phase of z and y, that taps reach from a row of outputs.
struct Reach {
  std::array<int64_t, 2> phase;
  int64_t least, most;
};

// What rows `outputs` of a band's blocks read in one phase; planes begin with the first of them.
void make_rows(const Shape& s, const Reach& reach, int64_t band, Range outputs, std::vector<Kind>& kinds, Layout& l, Weave& weave) {
  const auto& phase = reach.phase;
  for (int64_t r = outputs.first + reach.least; r < outputs.last + reach.most; ++r) {
    Weave::Row row{};
    row.out = (r - outputs.first) * l.pitch * kLanes;
    row.outputs = {r - reach.most, r - reach.least + 1};
    row.lines.first = static_cast<int64_t>(weave.lines.size());
    Kind kind{phase, 0};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t z = (r / l.rows + l.low[0]) * s.stride[0] + phase[0];
      const int64_t first = band * l.outputs(s, 1) + l.start(s, 1, lane / l.blocks[2] % l.blocks[1]);
      const int64_t y = (first + r % l.rows + l.low[1]) * s.stride[1] + phase[1];
      const int64_t x = (l.low[2] + l.start(s, 2, lane % l.blocks[2])) * s.stride[2];
      if (z < 0 || z >= s.in[0] || y < 0 || y >= s.in[1]) continue;          // read from the first pixel on, and dropped
      kind.inside |= 1u << lane;
      row.at[lane] = image_of(l, lane) * s.in_channels * s.pixels_in() + (z * s.in[1] + y) * s.in[2] + x;
      for (int64_t i = row.at[lane] / kLine; i <= (row.at[lane] + l.columns - 1) / kLine; ++i)
        if (std::find(weave.lines.begin(), weave.lines.end(), i * kLine) == weave.lines.end()) weave.lines.push_back(i * kLine);
    }
    row.lines.last = static_cast<int64_t>(weave.lines.size());
    const auto found = std::find(kinds.begin(), kinds.end(), kind);
    row.kind = found - kinds.begin();
    if (found == kinds.end()) kinds.push_back(kind), make_columns(s, kind, l);
    const auto [least, most] = std::minmax_element(row.at.begin(), row.at.begin() + kLanes);
    row.least = *least, row.most = *most + l.columns;
    weave.rows.push_back(row);
  }
}

// A row in the lanes, from channel 0 of a group of images to that of its planes.
template <class X>
FANIN_INLINE void weave_row(const Layout& l, const int32_t* inside, const Weave::Row& row, const X* x, float* out) {
  const int32_t* to = l.column_out.data() + row.kind * l.columns;
  inside += row.kind * l.columns * kLanes, out += row.out;
  int64_t at[kLanes];
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = row.at[lane];
  for (int64_t q = 0; q < l.columns; q += kPiece, x += kPiece, to += kPiece, inside += kPiece * kLanes) {
    vf v[kPiece];                                             // piece b of v[j]: columns q.. of lane b * kPiece + j
#pragma GCC unroll 4
    for (int j = 0; j < kPiece; ++j)
      v[j] = gather_pieces<kLanes>(0, [&](int b) __attribute__((always_inline)) { return widen<kPiece>(x + at[b * kPiece + j]); });
    transpose_pieces(v);
#pragma GCC unroll 4
    for (int j = 0; j < kPiece; ++j)
      if (to[j] >= 0) store_raw(out + to[j], keep<kLanes>(load_raw<vi>(inside + j * kLanes), v[j]));
  }
}

// The same where whole pieces would leave x.
template <class X>
void weave_by_pixel(const Layout& l, const int32_t* inside, const Weave::Row& row, const X* x, float* out) {
  const int32_t* to = l.column_out.data() + row.kind * l.columns;
  inside += row.kind * l.columns * kLanes, out += row.out;
  for (int64_t q = 0; q < l.columns; ++q)
    for (int64_t lane = 0; lane < kLanes && to[q] >= 0; ++lane)
      out[to[q] + lane] = inside[q * kLanes + lane] != 0 ? widen1(x + row.at[lane] + q) : 0.0f;
}

using Needed = std::vector<const Weave::Row*>;

template <class X>
void weave_planar(const Op& op, int64_t image, const Weave& weave, const Needed& rows, const int32_t* inside, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t channels = s.in_channels, pixels = s.pixels_in();
  for (int64_t c = 0; c < channels; ++c, planes += l.channel) {
    const int64_t before = (image * channels + c) * pixels, behind = op.batch * channels * pixels - before;
    const X* x = static_cast<const X*>(op.x) + before;
    const int64_t ahead = std::min(kChannelsAhead, channels - 1 - c) * pixels;
    for (const Weave::Row* row : rows)
      for (int64_t i = row->lines.first; i < row->lines.last; ++i) __builtin_prefetch(x + ahead + weave.lines[i]);
    for (const Weave::Row* row : rows) {
      if (row->least >= -before && row->most <= behind) weave_row(l, inside, *row, x, planes);
      else weave_by_pixel(l, inside, *row, x, planes);
    }
  }
}

// One column of channels_last x: kPiece channels at a time, which the transposes tell apart.
template <class X>
FANIN_INLINE void weave_column(const X* const (&from)[kLanes], int64_t channels, int64_t step, float* out) {
  int64_t c = 0;
  for (; c + kPiece <= channels; c += kPiece) {
    vf v[kPiece];                                             // piece b of v[j]: channels c.. of lane b * kPiece + j
#pragma GCC unroll 4
    for (int j = 0; j < kPiece; ++j)
      v[j] = gather_pieces<kLanes>(0, [&](int b) __attribute__((always_inline)) { return widen<kPiece>(from[b * kPiece + j] + c); });
    transpose_pieces(v);
#pragma GCC unroll 4
    for (int j = 0; j < kPiece; ++j, out += step) store_raw(out, v[j]);
  }
  for (; c < channels; ++c, out += step)
    for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = widen1(from[lane] + c);
}

// Channels at a time: half a line is written of each, which is still in L1 when the next column writes the other half.
constexpr int64_t kAtOnce = 256;

template <class X>
void weave_channels_last(const Op& op, int64_t image, const Needed& rows, const int32_t* inside, float* planes) {
  const Shape& s = op.geometry->shape;
  const Layout& l = op.geometry->layout;
  const int64_t channels = s.in_channels, size = channels * s.pixels_in();
  const X* x = static_cast<const X*>(op.x) + image * size;
  float* zeros = planes + channels * l.channel;
  std::fill_n(zeros, channels, 0.0f);
  int64_t begin[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) begin[lane] = image_of(l, lane) * size;
  for (int64_t first = 0; first < channels; first += kAtOnce) {
    const int64_t count = std::min(channels - first, kAtOnce);
    for (const Weave::Row* row : rows) {
      int64_t at[kLanes];                                     // of the row's first column
      for (int64_t lane = 0; lane < kLanes; ++lane) at[lane] = begin[lane] + (row->at[lane] - begin[lane]) * channels + first;
      const int32_t *to = l.column_out.data() + row->kind * l.columns, *keep = inside + row->kind * l.columns * kLanes;
      float* out = planes + first * l.channel + row->out;
      for (int64_t q = 0; q < l.columns; ++q) {
        if (to[q] < 0) continue;
        const X* from[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const X* pixel = x + at[lane] + q * channels;
          from[lane] = keep[q * kLanes + lane] != 0 ? pixel : reinterpret_cast<const X*>(zeros);
        }
        weave_column(from, count, l.channel, out + to[q]);
      }
    }
  }
}

// Tables for a group of which the last images are missing: their lanes are zeros, read from where the first one is.
Weave without_missing(const Layout& l, int64_t images, const Weave& weave, std::vector<int32_t>& inside) {
  Weave few = weave;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (image_of(l, lane) < images) continue;
    for (size_t i = lane; i < inside.size(); i += kLanes) inside[i] = 0;
    for (Weave::Row& row : few.rows) row.at[lane] = row.at[0];
  }
  for (Weave::Row& row : few.rows)
    row.most = *std::max_element(row.at.begin(), row.at.begin() + kLanes) + l.columns, row.lines = {};
  return few;
}

}  // namespace

void make_weaves(const Shape& s, Layout& l) {
  l.columns = (l.pitch * s.stride[2] + kPiece - 1) / kPiece * kPiece;
  std::vector<Reach> reaches;
  for (const int64_t tap : l.taps) {
    const Dims& p = l.phases[tap * kLanes / l.plane];
    const int64_t row = tap * kLanes % l.plane / (l.pitch * kLanes);
    const std::array phase{p[0], p[1]};
    auto found = std::find_if(reaches.begin(), reaches.end(), [&](const Reach& r) { return r.phase == phase; });
    if (found == reaches.end()) found = reaches.insert(found, {phase, row, row});
    found->least = std::min(found->least, row), found->most = std::max(found->most, row);
  }
  std::vector<Kind> kinds;
  for (int64_t unit = 0; unit < l.units(); ++unit) {
    const Range tiles = l.tiles_of(unit);
    const int64_t first = l.at(l.tiles[tiles.first]) / l.pitch;
    int64_t last = first;
    for (int64_t i = tiles.first; i < tiles.last; ++i)
      last = std::max(last, l.at(l.tiles[i]) / l.pitch + l.tiles[i].parts);
    Weave weave;
    for (const Reach& r : reaches) make_rows(s, r, l.band_of(unit), {first, last}, kinds, l, weave);
    l.weaves.push_back(std::move(weave));
  }
}

void weave(const Op& op, int64_t image, int64_t unit, Range outputs, float* planes) {
  const Layout& l = op.geometry->layout;
  const int32_t* inside = l.column_inside.data();
  const Weave* weave = &l.weaves[unit];
  std::vector<int32_t> present;
  Weave few;
  if (op.batch - image < l.images) {
    present = l.column_inside;
    few = without_missing(l, op.batch - image, *weave, present);
    inside = present.data(), weave = &few;
  }
  Needed rows;
  for (const Weave::Row& row : weave->rows)
    if (row.outputs.first < outputs.last && row.outputs.last > outputs.first) rows.push_back(&row);
  with_dtype(op.x_type, [&](auto zero) {
    using X = decltype(zero);
    if (op.channels_last) weave_channels_last<X>(op, image, rows, inside, planes);
    else weave_planar<X>(op, image, *weave, rows, inside, planes);
  });
}

}  // namespace fanin::conv::bytesN
