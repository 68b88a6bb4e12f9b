// Attention of few queries over many keys: scores of a tile of keys for all queries of their head, softmax, and the same over
// the values. Each row of the cache is read once, and written on to the appended cache while it is in L1.
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
constexpr int64_t kAhead = 4096;                // bytes: the hardware's own requests end with a page
constexpr int64_t kStreamed = 256 << 10;        // bytes of an appended cache that a small L2 does not hold beside the old one

// f(first row, its position, how many) for tiles of the rows of head h of image b; then they are copied, if they are wanted.
template <class F>
FANIN_INLINE void for_tiles(const Op& op, const Appended& a, int64_t b, int64_t h, const F& f) {
  const bool streams = op.batch * op.heads * a.length() * a.dim * static_cast<int64_t>(sizeof(float)) >= kStreamed;
  const auto copy = [&](float* to, const float* from, int64_t count) {
    if (streams) stream_copy(to, from, count);
    else std::memcpy(to, from, count * sizeof(float));
  };
  const auto part = [&](const Rows& rows, int64_t position, int64_t length) __attribute__((always_inline)) {
    if (length == 0) return;
    const float* data = rows.data + b * rows.batch + h * rows.head;
    float* to = a.all ? a.all + ((b * op.heads + h) * a.length() + position) * a.dim : nullptr;
    for (int64_t i = 0; i < length; i += kTile) {
      const int64_t count = std::min(kTile, length - i);
      const float* tile = data + i * rows.row;
      for (int64_t j = 0; j < count; ++j) request(tile + j * rows.row, tile + j * rows.row + a.dim, kAhead);
      f(tile, rows.row, position + i, count);
      if (!to) continue;
      if (rows.row == a.dim) copy(to + i * a.dim, tile, count * a.dim);
      else
        for (int64_t j = 0; j < count; ++j) copy(to + (i + j) * a.dim, tile + j * rows.row, a.dim);
    }
  };
  part(a.past, 0, a.past_length);
  part(a.fresh, a.past_length, a.fresh_length);
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

// Of a row of scores; score() may write beyond the last.
int64_t pitch(const Op& op) { return round_up(op.length() + kPiece, kLanes); }

}  // namespace

int64_t scratch_floats(const Op& op) { return op.rows() * (pitch(op) + round_up(op.keys.dim, kLanes)); }

void run_heads(const Op& op, int64_t first, int64_t last, float* scratch) {
  const int64_t width = round_up(op.keys.dim, kLanes), line = pitch(op), rows = op.rows();
  float* const queries = scratch;                               // [rows, width], scaled
  float* const scores = scratch + rows * width;                 // [rows, line]
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t b = unit / op.heads, h = unit % op.heads;
    const auto head_of = [&](int64_t r) { return h * op.group + r / op.queries; };
    const auto y_of = [&](int64_t r) {
      return op.y + ((b * op.queries + r % op.queries) * op.heads * op.group + head_of(r)) * op.values.dim;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = op.query.data + b * op.query.batch + head_of(r) * op.query.head + r % op.queries * op.query.row;
      float* to = queries + r * width;
      for (int64_t d = 0; d < op.keys.dim; ++d) to[d] = q[d] * op.scale;
      std::fill(to + op.keys.dim, to + width, 0.0f);
    }
    for_tiles(op, op.keys, b, h, [&](const float* tile, int64_t stride, int64_t at, int64_t count) {
      for (int64_t r = 0; r < rows; ++r) score(queries + r * width, tile, stride, count, op.keys.dim, scores + r * line + at);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const Mask& m = op.mask;
      apply_mask(m, b * m.batch + head_of(r) * m.head + r % op.queries * m.query, op.length(), scores + r * line);
      softmax(scores + r * line, op.length());
      std::fill_n(y_of(r), op.values.dim, 0.0f);
    }
    for_tiles(op, op.values, b, h, [&](const float* tile, int64_t stride, int64_t at, int64_t count) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* weights = scores + r * line + at;
        float* y = y_of(r);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) add_rows<4>(tile + i * stride, stride, weights + i, op.values.dim, y);
        for (; i < count; ++i) add_rows<1>(tile + i * stride, stride, weights + i, op.values.dim, y);
      }
    });
  }
  if (op.keys.all) stream_end();
}

}  // namespace fanin::attention
