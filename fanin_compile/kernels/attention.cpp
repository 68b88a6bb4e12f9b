// Attention of few queries over many keys: scores of a tile of keys for all queries of their head, softmax, and the same over
// the values. Each row of the cache is read once, and written on to the appended cache while it is in L1; rows that no query
// may see are not read.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "linear_stream.h"
#include "planar_store.h"

namespace fanin::attention {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int64_t kTile = 16;   // rows
constexpr int64_t kAhead = 2;   // tiles that are requested before they are read
static_assert(kTile % kLanes == 0);
constexpr int64_t kStreamed = 256 << 10;        // bytes of an appended cache that a small L2 does not hold beside the old one

// Rows of one head that are read together.
struct Tile {
  const float* data;
  int64_t stride, position, count, dim;
};

// Positions of keys, from `first` until before `last`.
struct Span {
  int64_t first, last;
  int64_t length() const { return last - first; }
};

// The tile from `position` on, which is before `last`, of the rows of head h of image b, before it too.
FANIN_INLINE Tile tile_at(const Appended& a, int64_t b, int64_t h, int64_t position, int64_t last) {
  const bool fresh = position >= a.past_length;
  const Rows& rows = fresh ? a.fresh : a.past;
  const int64_t i = fresh ? position - a.past_length : position, end = fresh ? last : std::min(last, a.past_length);
  return {rows.data + b * rows.batch + h * rows.head + i * rows.row, rows.row, position,
          std::min(kTile, end - position), a.dim};
}

FANIN_INLINE void request_tile(const Tile& tile) {
  for (int64_t j = 0; j < tile.count; ++j) request(tile.data + j * tile.stride, tile.data + j * tile.stride + tile.dim, 0);
}

// f(tile) for the tiles of these rows of head h of image b, each after next(); then they are copied, if they are wanted.
template <class Next, class F>
FANIN_INLINE void for_tiles(const Op& op, const Appended& a, int64_t b, int64_t h, Span span, const Next& next, const F& f) {
  const bool streams = op.batch * op.heads * a.length() * a.dim * static_cast<int64_t>(sizeof(float)) >= kStreamed;
  const auto copy = [&](float* to, const float* from, int64_t count) {
    if (streams) stream_copy(to, from, count);
    else std::memcpy(to, from, count * sizeof(float));
  };
  for (int64_t at = span.first; at < span.last;) {
    const Tile tile = tile_at(a, b, h, at, span.last);
    next();
    f(tile);
    at += tile.count;
    if (!a.all) continue;
    float* to = a.all + ((b * op.heads + h) * a.length() + tile.position) * a.dim;
    if (tile.stride == a.dim) copy(to, tile.data, tile.count * a.dim);
    else
      for (int64_t j = 0; j < tile.count; ++j) copy(to + j * a.dim, tile.data + j * tile.stride, a.dim);
  }
}

template <int... B>
FANIN_INLINE vp sum_pieces(vf v, std::integer_sequence<int, B...>) { return (piece<B>(v) + ...); }
FANIN_INLINE vp sum_pieces(vf v) { return sum_pieces(v, std::make_integer_sequence<int, kLanes / kPiece>{}); }
FANIN_INLINE float sum_lanes(vf v) {
  const vp p = sum_pieces(v);
  float sum = p[0];
  for (int i = 1; i < kPiece; ++i) sum += p[i];
  return sum;
}

// The products of q, zeros behind its dim elements, with kPiece rows.
FANIN_INLINE vp products(const float* q, const float* const (&rows)[kPiece], int64_t dim) {
  vf sums[kPiece] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const vf a = load_raw<vf>(q + d);
    for (int j = 0; j < kPiece; ++j) sums[j] += a * load_raw<vf>(rows[j] + d);
  }
  if (d < dim) {
    const vf a = load_raw<vf>(q + d);
    for (int j = 0; j < kPiece; ++j) sums[j] += a * load_part(rows[j] + d, dim - d);
  }
  transpose_pieces(sums);
  for (int j = 1; j < kPiece; ++j) sums[0] += sums[j];
  return sum_pieces(sums[0]);
}

// The last few rows stand for those that are missing: up to kPiece - 1 scores more than `count` are written.
FANIN_INLINE void score(const float* q, const float* tile, int64_t stride, int64_t count, int64_t dim, float* scores) {
  for (int64_t i = 0; i < count; i += kPiece) {
    const float* rows[kPiece];
    for (int64_t j = 0; j < kPiece; ++j) rows[j] = tile + std::min(i + j, count - 1) * stride;
    store_raw(scores + i, products(q, rows, dim));
  }
}

void apply_mask(const Mask& mask, int64_t at, int64_t length, float* scores) {
  if (mask.kind == Mask::Kind::adds) {
    const float* m = static_cast<const float*>(mask.data) + at;
    for (int64_t t = 0; t < length; ++t) scores[t] += m[t * mask.key];
  } else if (mask.kind == Mask::Kind::hides) {
    const bool* m = static_cast<const bool*>(mask.data) + at;
    for (int64_t t = 0; t < length; ++t) scores[t] = m[t * mask.key] ? scores[t] : kHidden;
  }
}

// The least span that has all keys which a mask that hides, at `at` for a query, shows.
Span shown(const Mask& mask, int64_t at, int64_t length) {
  const bool* m = static_cast<const bool*>(mask.data) + at;
  const auto shows = [&](int64_t t) { return m[t * mask.key]; };
  Span span{0, length};
  if (mask.key == 1) {
    const void* found = std::memchr(m, 1, length);
    span.first = found ? static_cast<const bool*>(found) - m : length;
  } else {
    while (span.first < length && !shows(span.first)) ++span.first;
  }
  while (span.last > span.first && !shows(span.last - 1)) --span.last;
  return span;
}

// Scores to weights that sum to one. Whole vectors are written.
void softmax(float* scores, int64_t length) {
  const int64_t whole = round_up(length, kLanes);
  std::fill(scores + length, scores + whole, kHidden);
  vf most = splat(kHidden);
  for (int64_t t = 0; t < whole; t += kLanes) most = at_least(load_raw<vf>(scores + t), most);
  float top = kHidden;
  for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
  if (top == kHidden) {         // all are hidden, or NaN, which stays
    for (int64_t t = 0; t < whole; t += kLanes) {
      const vf s = load_raw<vf>(scores + t);
      store_raw(scores + t, keep<kLanes>((vi)(s != kHidden), s));
    }
    return;
  }
  vf sums{};
  for (int64_t t = 0; t < whole; t += kLanes) {
    const vf x = load_raw<vf>(scores + t) - top;
    // exp saturates, where what is hidden must vanish; and it does not keep every NaN
    const vf e = select<kLanes>((vi)(x >= -87.0f), exp(x), keep<kLanes>((vi)(x != x), x));
    store_raw(scores + t, e);
    sums += e;
  }
  const float inverse = 1.0f / sum_lanes(sums);
  for (int64_t t = 0; t < whole; t += kLanes) store_raw(scores + t, load_raw<vf>(scores + t) * inverse);
}

// y += weights of N rows times them.
template <int N>
FANIN_INLINE void add_rows(const float* rows, int64_t stride, const float* weights, int64_t dim, float* y) {
  vf w[N];
  for (int j = 0; j < N; ++j) w[j] = splat(weights[j]);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t n = dim - d;
    vf sum = load_some(y + d, n);
    for (int j = 0; j < N; ++j) sum += w[j] * load_some(rows + j * stride + d, n);
    store_some(y + d, sum, n);
  }
}

// The new rows of head h of image b to where they belong in a cache.
void write_rows(const Written& w, const Rows& rows, const Appended& cache, float* to, int64_t b, int64_t h) {
  const float* from = rows.data + b * rows.batch + h * rows.head;
  to += b * cache.past.batch + h * cache.past.head;
  for (int64_t i = 0; i < w.count; ++i)
    std::memcpy(to + w.position[i] * cache.past.row, from + i * rows.row, cache.dim * sizeof(float));
}

// Of a row of scores; score() may write beyond the last.
int64_t pitch(const Op& op) { return round_up(op.length() + kPiece, kLanes); }

}  // namespace

int64_t scratch_floats(const Op& op) { return op.rows() * (pitch(op) + round_up(op.keys.dim, kLanes)); }

void run_heads(const Op& op, int64_t first, int64_t last, float* scratch) {
  const int64_t width = round_up(op.keys.dim, kLanes), line = pitch(op), rows = op.rows();
  float* const queries = scratch;                               // [rows, width], scaled
  float* const scores = scratch + rows * width;                 // [rows, line], from the first key seen on
  const Mask& mask = op.mask;
  const auto head_of = [&](int64_t h, int64_t r) { return h * op.group + r / op.queries; };
  const auto mask_at = [&](int64_t b, int64_t h, int64_t r) {
    return b * mask.batch + head_of(h, r) * mask.head + r % op.queries * mask.query;
  };
  // the keys that any query sees which reads the unit's head; all, if they are copied
  const auto span_of = [&](int64_t unit) {
    Span span{0, op.length()};
    if (mask.kind != Mask::Kind::hides || op.keys.all) return span;
    const int64_t masks = mask.head == 0 && mask.query == 0 ? std::min<int64_t>(1, rows) : rows;
    span = {op.length(), 0};
    for (int64_t r = 0; r < masks; ++r) {
      const Span one = shown(mask, mask_at(unit / op.heads, unit % op.heads, r), op.length());
      if (one.length() > 0) span = {std::min(span.first, one.first), std::max(span.last, one.last)};
    }
    if (span.length() <= 0) return Span{0, 0};
    return Span{span.first - span.first % kTile, span.last};    // each key in the lane that it has among all: the same sums
  };
  // heads of an image share a mask most often
  const auto same_mask = [&](int64_t unit) { return mask.head == 0 && unit % op.heads != 0; };
  // requests run ahead through all tiles in the order in which they are read: keys, then values of head after head
  struct {
    int64_t unit, position;
    Span span;
    bool values;
  } ahead{first - 1, 0, {}, true};
  const auto request_next = [&] {
    while (ahead.position >= ahead.span.last) {
      ahead.values = !ahead.values;
      if (!ahead.values) {
        if (++ahead.unit >= last) {
          ahead.unit = last - 1, ahead.values = true;
          return;
        }
        if (ahead.unit == first || !same_mask(ahead.unit)) ahead.span = span_of(ahead.unit);
      }
      ahead.position = ahead.span.first;
    }
    const Appended& a = ahead.values ? op.values : op.keys;
    const Tile tile = tile_at(a, ahead.unit / op.heads, ahead.unit % op.heads, ahead.position, ahead.span.last);
    request_tile(tile);
    ahead.position += tile.count;
  };
  for (int64_t i = 0; i < kAhead; ++i) request_next();
  Span span{};
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t b = unit / op.heads, h = unit % op.heads;
    if (unit == first || !same_mask(unit)) span = span_of(unit);
    write_rows(op.written, op.written.keys, op.keys, op.written.to_keys, b, h);
    write_rows(op.written, op.written.values, op.values, op.written.to_values, b, h);
    const auto y_of = [&](int64_t r) {
      return op.y + ((b * op.queries + r % op.queries) * op.heads * op.group + head_of(h, r)) * op.values.dim;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = op.query.data + b * op.query.batch + head_of(h, r) * op.query.head + r % op.queries * op.query.row;
      float* to = queries + r * width;
      for (int64_t d = 0; d < op.keys.dim; ++d) to[d] = q[d] * op.scale;
      std::fill(to + op.keys.dim, to + width, 0.0f);
    }
    for_tiles(op, op.keys, b, h, span, request_next, [&](const Tile& tile) {
      for (int64_t r = 0; r < rows; ++r)
        score(queries + r * width, tile.data, tile.stride, tile.count, tile.dim, scores + r * line + tile.position - span.first);
    });
    for (int64_t r = 0; r < rows; ++r) {
      apply_mask(mask, mask_at(b, h, r) + span.first * mask.key, span.length(), scores + r * line);
      softmax(scores + r * line, span.length());
      std::fill_n(y_of(r), op.values.dim, 0.0f);
    }
    for_tiles(op, op.values, b, h, span, request_next, [&](const Tile& tile) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* weights = scores + r * line + tile.position - span.first;
        float* y = y_of(r);
        int64_t i = 0;
        for (; i + 4 <= tile.count; i += 4) add_rows<4>(tile.data + i * tile.stride, tile.stride, weights + i, tile.dim, y);
        for (; i < tile.count; ++i) add_rows<1>(tile.data + i * tile.stride, tile.stride, weights + i, tile.dim, y);
      }
    });
  }
  if (op.keys.all) stream_end();
}

}  // namespace fanin::attention
