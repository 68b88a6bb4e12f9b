// The convolution microkernel: one weight is broadcast against a tile of consecutive outputs.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

// A tile is A vectors at p and B more at p + gap: of the second image, or the last vector, which may overlap the others.
template <int A, int B>
struct Sums {
  vf v[A + B];

  FANIN_INLINE void clear() {
#pragma GCC unroll 16
    for (int t = 0; t < A + B; ++t) v[t] = vf{};
  }
  FANIN_INLINE void load(const float* sums) {
#pragma GCC unroll 16
    for (int t = 0; t < A + B; ++t) v[t] = load_raw<vf>(sums + t * kLanes);
  }
  FANIN_INLINE void store(float* sums) const {
#pragma GCC unroll 16
    for (int t = 0; t < A + B; ++t) store_raw(sums + t * kLanes, v[t]);
  }
  FANIN_INLINE void add(vf weight, const float* x, int64_t gap) {
#pragma GCC unroll 16
    for (int t = 0; t < A; ++t) v[t] += weight * load_raw<vf>(x + t * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < B; ++t) v[A + t] += weight * load_raw<vf>(x + gap + t * kLanes);
  }
  template <class V, int... J>
  FANIN_INLINE void add4(const V* values, const uint16_t* offsets, const float* x, int64_t step, int64_t gap,
                         std::integer_sequence<int, J...>) {
    const Weights4 w(values);
    (add(w.pick<J>(), x + offsets[J] * step, gap), ...);
  }
};

struct Runs {
  const Visit *visit, *whole, *first, *middle, *end;
  const void* values;
  const uint16_t* offsets;
  const float* x;
  float* sums;
  int64_t step, gap;            // floats between offsets; from the first part of the tile to the second
  // Where rows are finished in registers, or null: y of output channel 0, and by how much channels and the parts differ.
  float* y;
  const float *residual, *bias;
  const int32_t* live;
  int64_t pixels;
  float floor;                  // -infinity, or 0 for relu
};

// Runs are visited in the order of their lengths, which no hardware prefetcher follows.

template <class V>
FANIN_INLINE void prefetch_weights(const Runs& r, const Visit& visit) {
  const char* w = static_cast<const char*>(r.values) + visit.start * sizeof(V);
  const char* o = reinterpret_cast<const char*>(r.offsets + visit.start);
  for (uint32_t i = 0; i < visit.count * sizeof(V) + 63; i += 64) __builtin_prefetch(w + i);
  for (uint32_t i = 0; i < visit.count * sizeof(uint16_t) + 63; i += 64) __builtin_prefetch(o + i);
}

// Last runs of their rows: bias, residual and relu, and out.
template <int A, int B>
FANIN_INLINE void finish(const Runs& r, Sums<A, B>& sums, int32_t channel) {
  const int64_t at = channel * r.pixels;
  const vf bias = splat(r.bias ? r.bias[channel] : 0.0f), floor = splat(r.floor);
#pragma GCC unroll 16
  for (int t = 0; t < A + B; ++t) {
    const int64_t i = at + (t < A ? t * kLanes : r.gap + (t - A) * kLanes);
    vf v = sums.v[t] + bias;
    if (r.residual) v += load_raw<vf>(r.residual + i);
    store_raw(r.y + i, select<kLanes>(v < floor, floor, v));
  }
}

template <int A, int B, class V>
void accumulate(const Runs& r) {
  using S4 = std::make_integer_sequence<int, 4>;
  const int64_t step = r.step, gap = r.gap;
  for (const Visit* visit = r.visit; visit < r.end; ++visit) {
    const V* w = static_cast<const V*>(r.values) + visit->start;
    const uint16_t* o = r.offsets + visit->start;
    float* out = r.sums + visit->row * ((A + B) * kLanes);
    prefetch_weights<V>(r, visit[kVisitsAhead]);
    Sums<A, B> sums;
    if (visit < r.first) sums.clear();
    else sums.load(out);
    int left = visit->count;
    for (; left >= 4; left -= 4, w += 4, o += 4) sums.add4(w, o, r.x, step, gap, S4{});
    for (int j = 0; j < left; ++j) sums.add(splat(widen1(w + j)), r.x + o[j] * step, gap);
    if (r.y && (visit < r.whole || visit >= r.middle)) finish(r, sums, r.live[visit->row]);
    else sums.store(out);
  }
}

using Kernel = void (*)(const Runs&);

template <class V, int... T>
constexpr std::array<Kernel, kMaxTile> one_run(std::integer_sequence<int, T...>) { return {accumulate<T, 1, V>...}; }
template <class V, int... T>
constexpr std::array<Kernel, kMaxTile / 2> two_runs(std::integer_sequence<int, T...>) {
  return {accumulate<T + 1, T + 1, V>...};
}

// vectors per image, images -> kernel
template <class V>
Kernel kernel(int64_t vectors, int64_t images) {
  static constexpr auto one = one_run<V>(std::make_integer_sequence<int, kMaxTile>{});
  static constexpr auto two = two_runs<V>(std::make_integer_sequence<int, kMaxTile / 2>{});
  return images == 2 ? two[vectors - 1] : one[vectors - 1];
}

// The outputs of lanes [from, to), of which lane `from` is sums[0].
void pieces_of(const Plan& plan, int64_t from, int64_t to, int64_t lane, std::vector<Piece>& pieces) {
  const Layout& l = plan.layout;
  const Dims& out = plan.shape.out;
  for (int64_t at = from; at < to;) {
    const int64_t row = at / l.pitch, x = at % l.pitch, y = row % l.rows, z = row / l.rows;
    const int64_t stop = std::min(to, (row + 1) * l.pitch);
    if (x < out[2] && y < out[1] && z < out[0])
      pieces.push_back({lane + at - from, (z * out[1] + y) * out[2] + x, std::min(stop - at, out[2] - x)});
    at = stop;
  }
}

}  // namespace

int64_t scratch_floats(const Plan& plan, int64_t first_block, int64_t last_block) {
  const Layout& l = plan.layout;
  int64_t rows = 0;
  for (int64_t b = first_block; b < last_block; ++b) rows = std::max(rows, plan.block[b + 1] - plan.block[b]);
  return l.images * plan.shape.in_channels * l.channel + rows * kMaxTile * kLanes + 4 * kLanes;
}

void run(const Op& op, int64_t image, int64_t images, int64_t unit, int64_t first_block, int64_t last_block, float* scratch) {
  const Plan& plan = *op.plan;
  const Layout& l = plan.layout;
  const int64_t planes = plan.shape.in_channels * l.channel;
  const int64_t tile0 = unit * l.tiles / l.units, tile1 = (unit + 1) * l.tiles / l.units;
  for (int64_t i = 0; i < images; ++i) pack(op, image + i, unit, scratch + i * planes);

  const bool absolute = plan.offsets.empty();   // offsets count from channel 0, not from the chunk's first
  const bool finished = l.pointwise && images == 1 && l.lanes >= kLanes && !op.channels_last && op.x_type == DType::f32 &&
                        (!op.bias || op.bias_type == DType::f32) && (op.act == Act::none || op.act == Act::relu);
  Runs runs{};
  runs.values = op.values;
  runs.offsets = absolute ? op.offsets : plan.offsets.data();
  runs.step = l.pointwise ? l.channel : 1;
  runs.sums = scratch + l.images * planes + 2 * kLanes;
  runs.pixels = plan.shape.pixels_out();
  runs.bias = static_cast<const float*>(op.bias);
  runs.floor = op.act == Act::relu ? 0.0f : -std::numeric_limits<float>::infinity();

  std::vector<Piece> pieces;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t lane = l.first(tile) * kLanes, vectors = l.first(tile + 1) - l.first(tile);
    const int64_t lanes = std::min(vectors * kLanes, l.lanes - lane);
    const float* x = scratch + (lane - l.first(tile0) * kLanes);
    runs.gap = images == 2 ? planes : (finished ? lanes : vectors * kLanes) - kLanes;
    if (finished) {                             // one image, its pixels in order: rows leave from registers
      const int64_t at = image * plan.shape.out_channels * runs.pixels + lane;
      runs.y = static_cast<float*>(op.y) + at;
      runs.residual = op.residual ? static_cast<const float*>(op.residual) + at : nullptr;
    }
    const Kernel accumulate = with_dtype(op.value_type, [&](auto v) { return kernel<decltype(v)>(vectors, images); });
    for (int64_t block = first_block; block < last_block; ++block) {
      runs.live = plan.live.data() + plan.block[block];
      for (const Stage& stage : plan.stages[block]) {
        runs.visit = plan.visits.data() + stage.begin;
        runs.whole = plan.visits.data() + stage.whole;
        runs.first = plan.visits.data() + stage.first;
        runs.middle = plan.visits.data() + stage.middle;
        runs.end = plan.visits.data() + stage.end;
        runs.x = x + (absolute ? 0 : stage.channel * l.channel);
        accumulate(runs);
      }
      for (int64_t i = 0; i < images && !finished; ++i) {
        pieces.clear();
        pieces_of(plan, lane, lane + lanes, i * vectors * kLanes, pieces);
        store(op, image + i, pieces, runs.sums, vectors * images * kLanes, plan.block[block], plan.block[block + 1]);
      }
    }
  }
}

}  // namespace fanin::conv
