// The convolution microkernel: weights are broadcast against a tile of outputs.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "activation.h"
#include "conv.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin::conv {
namespace {

// Sums of R rows in a tile of P parts of N vectors, which are `gap` floats apart in x.
template <int R, int P, int N>
struct Sums {
  static constexpr int kVectors = P * N;
  vf v[R * kVectors];

  FANIN_INLINE void clear() {
#pragma GCC unroll 16
    for (int t = 0; t < R * kVectors; ++t) v[t] = vf{};
  }
  template <int Row>
  FANIN_INLINE void load(const float* sums) {
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) v[Row * kVectors + t] = load_raw<vf>(sums + t * kLanes);
  }
  template <int Row>
  FANIN_INLINE void store(float* sums) const {
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) store_raw(sums + t * kLanes, v[Row * kVectors + t]);
  }
  template <int Row>
  FANIN_INLINE void add(vf weight, const float* x, int64_t gap) {
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) v[Row * kVectors + t] += weight * load_raw<vf>(x + t / N * gap + t % N * kLanes);
  }
  template <int... J>
  FANIN_INLINE void add4(const float* values, const uint16_t* offsets, const float* x, int64_t gap,
                         std::integer_sequence<int, J...>) {
    const Weights4 w(values);
    (add<J % R>(w.pick<J>(), x + offsets[J], gap), ...);
  }
};

// Where rows that end in registers go: a tile of consecutive elements of each output channel.
struct Target {
  float* y;                     // of channel 0
  const float *residual, *bias;
  const int32_t* live;
  int64_t pixels;
  float floor, ceiling;         // infinite, or what relu and relu6 clamp to
};

constexpr int kVisitsAhead = 4;

// Visits of one kind.
struct Runs {
  const uint16_t *count, *end, *rows, *offsets;
  const float *values, *x;
  float* sums;
  int64_t gap;
  bool fresh;                   // sums start from zero
  const Target* target;         // of runs that end their rows, or null: sums are kept
};

// Bias, residual and clamp, and out.
template <int Row, class S>
FANIN_INLINE void finish(const Target& o, const S& sums, int32_t channel) {
  const vf bias = splat(o.bias ? o.bias[channel] : 0.0f);
  const float floor = o.floor, ceiling = o.ceiling;           // read once: y might alias them
  float* y = o.y + channel * o.pixels;
  const float* residual = o.residual ? o.residual + channel * o.pixels : nullptr;
#pragma GCC unroll 16
  for (int t = 0; t < S::kVectors; ++t) {
    vf v = sums.v[Row * S::kVectors + t] + bias;
    if (residual) v += load_raw<vf>(residual + t * kLanes);
    store_raw(y + t * kLanes, clamp(v, floor, ceiling));
  }
}

// Output channels lie far apart: the lines of a row some visits ahead are requested early.
template <int N>
FANIN_INLINE void prefetch(const Target& o, int32_t channel) {
  constexpr int step = kLanes < 16 ? 16 / kLanes : 1;
  const int64_t base = channel * o.pixels;
#pragma GCC unroll 16
  for (int t = 0; t < N + step - 1; t += step) {
    const int64_t i = base + (t < N ? t * kLanes : N * kLanes - 1);
    __builtin_prefetch(o.y + i, 1);
    if (o.residual) __builtin_prefetch(o.residual + i);
  }
}

// f(row) for each of R rows, row a constant.
template <class F, int... Row>
FANIN_INLINE void each_of(std::integer_sequence<int, Row...>, F&& f) {
  (f(std::integral_constant<int, Row>{}), ...);
}

template <int R, int P, int N>
void accumulate(Runs& r) {
  using S4 = std::make_integer_sequence<int, 4>;
  using Rows = std::make_integer_sequence<int, R>;
  static_assert(R == 1 || R == 4);
  constexpr int kSums = P * N * kLanes;
  const float* w = r.values;
  const uint16_t *o = r.offsets, *row = r.rows;
  const int64_t gap = r.gap;
  const float* x = r.x;
  float* kept = r.sums;
  const bool fresh = r.fresh, ends = r.target;
  const Target target = ends ? *r.target : Target{};
  for (const uint16_t* count = r.count; count < r.end; ++count, row += R) {
    if (ends && r.end - count > kVisitsAhead)
      each_of(Rows{}, [&](auto i) __attribute__((always_inline)) { prefetch<N>(target, target.live[row[kVisitsAhead * R + i]]); });
    Sums<R, P, N> sums;
    if (fresh) sums.clear();
    else each_of(Rows{}, [&](auto i) __attribute__((always_inline)) { sums.template load<i>(kept + row[i] * kSums); });
    int left = *count * R;
    for (; left >= 4; left -= 4, w += 4, o += 4) sums.add4(w, o, x, gap, S4{});
    if constexpr (R == 1)
      for (; left > 0; --left, ++w, ++o) sums.template add<0>(splat(*w), x + *o, gap);
    if (ends) each_of(Rows{}, [&](auto i) __attribute__((always_inline)) { finish<i>(target, sums, target.live[row[i]]); });
    else each_of(Rows{}, [&](auto i) __attribute__((always_inline)) { sums.template store<i>(kept + row[i] * kSums); });
  }
  r.count = r.end, r.rows = row, r.offsets = o, r.values = w;
}

using Kernel = void (*)(Runs&);

template <int P, int... N>
constexpr std::array<Kernel, kMaxTile> of_parts(std::integer_sequence<int, N...>) {
  return {[] {
    if constexpr ((N + 1) * P <= kMaxTile) return &accumulate<1, P, N + 1>;
    else return Kernel{};
  }()...};
}
template <int... N>
constexpr std::array<Kernel, kNarrow> narrow_tiles(std::integer_sequence<int, N...>) {
  return {&accumulate<kTogether, 1, N + 1>...};
}

Kernel kernel(const Tile& tile, int together) {
  using All = std::make_integer_sequence<int, kMaxTile>;
  static_assert(kMaxParts == 4);
  static constexpr std::array<std::array<Kernel, kMaxTile>, kMaxParts> wide{
      of_parts<1>(All{}), of_parts<2>(All{}), of_parts<3>(All{}), of_parts<4>(All{})};
  static constexpr auto narrow = narrow_tiles(std::make_integer_sequence<int, kNarrow>{});
  return together == 1 ? wide[tile.parts - 1][tile.vectors - 1] : narrow[tile.vectors - 1];
}

// The lanes of a tile in y. True if they are consecutive elements.
bool places_of(const Op& op, int64_t image, const Tile& tile, Places& places) {
  const Shape& s = op.plan->shape;
  const Layout& l = op.plan->layout;
  const int64_t pixels = s.pixels_out(), step = op.channels_last ? s.out_channels : 1;
  const int64_t images = std::min(l.images, op.batch - image), begin = image * s.out_channels * pixels;
  places.channel = op.channels_last ? 1 : pixels;
  if (!l.pointwise) {
    int64_t lane = 0;
    for (int64_t i = 0; i < l.images; ++i)
      for (int64_t down = 0; down < l.blocks[1]; ++down)
        for (int64_t across = 0; across < l.blocks[2]; ++across, ++lane)
          for (int part = 0; part < tile.parts; ++part)
            for (int t = 0; t < tile.vectors; ++t) {
              const int64_t y = l.start(s, 1, down) + tile.y + part, x = l.start(s, 2, across) + tile.x + t;
              const int64_t pixel = (tile.z * s.out[1] + y) * s.out[2] + x;
              places.at[part * tile.vectors + t][lane] =
                  i < images ? begin + i * s.out_channels * pixels + pixel * step : -1;
            }
    return false;
  }
  bool straight = true;
  int64_t i = tile.x * kLanes / pixels, pixel = tile.x * kLanes % pixels;
  for (int t = 0; t < tile.vectors; ++t)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      places.at[t][lane] = i < images ? begin + i * s.out_channels * pixels + pixel * step : -1;
      straight = straight && i < images && places.at[t][lane] == places.at[0][0] + t * kLanes + lane;
      if (++pixel == pixels) pixel = 0, ++i;
    }
  return straight && (step == 1 || s.out_channels == 1);
}

}  // namespace

int64_t scratch_floats(const Plan& plan, int64_t first_block, int64_t last_block) {
  int64_t rows = 0;
  for (int64_t b = first_block; b < last_block; ++b) rows = std::max(rows, plan.block[b + 1] - plan.block[b]);
  return pack_floats(plan) + rows * kMaxTile * kLanes;
}

void run(const Op& op, int64_t image, int64_t unit, int64_t first_block, int64_t last_block, float* scratch) {
  const Plan& plan = *op.plan;
  const Layout& l = plan.layout;
  const Tile* first = l.tiles.data() + l.unit[unit];
  float *sums = scratch, *planes = sums;
  for (int64_t b = first_block; b < last_block; ++b)
    planes = std::max(planes, sums + (plan.block[b + 1] - plan.block[b]) * kMaxTile * kLanes);
  pack(op, image, unit, planes);

  Places places;
  Target target{};
  target.bias = static_cast<const float*>(op.bias);
  target.pixels = plan.shape.pixels_out();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  target.floor = op.act == Act::none ? -infinity : 0.0f;
  target.ceiling = op.act == Act::relu6 ? 6.0f : infinity;
  const bool simple = op.x_type == DType::f32 && (!op.bias || op.bias_type == DType::f32) &&
                      (op.act == Act::none || op.act == Act::relu || op.act == Act::relu6);
  for (const Tile* tile = first; tile < l.tiles.data() + l.unit[unit + 1]; ++tile) {
    const bool finished = places_of(op, image, *tile, places) && simple;
    target.y = static_cast<float*>(op.y) + places.at[0][0];
    target.residual = op.residual ? static_cast<const float*>(op.residual) + places.at[0][0] : nullptr;
    const float* x = planes + (l.pointwise ? (tile - first) * packed_channels(plan) * l.channel
                                           : (l.at(*tile) - l.at(*first) / l.pitch * l.pitch) * kLanes);
    const Kernel accumulate = kernel(*tile, l.together);
    for (int64_t block = first_block; block < last_block; ++block) {
      target.live = plan.live.data() + plan.block[block];
      for (const Stage& stage : plan.stages[block]) {
        Runs runs{};
        runs.count = plan.counts.data() + stage.begin, runs.rows = plan.rows.data() + stage.begin * l.together;
        runs.offsets = plan.offsets.data() + stage.nonzero, runs.values = plan.values.data() + stage.nonzero;
        runs.x = x + chunk_at(l, stage.channel), runs.sums = sums, runs.gap = l.pitch * kLanes;
        for (int part = 0; part < 4; ++part) {
          runs.end = plan.counts.data() + stage.end[part];
          runs.fresh = part < 2;
          runs.target = finished && (part == 0 || part == 3) ? &target : nullptr;
          accumulate(runs);
        }
      }
      if (!finished) store(op, *tile, places, sums, plan.block[block], plan.block[block + 1]);
    }
  }
}

}  // namespace fanin::conv
