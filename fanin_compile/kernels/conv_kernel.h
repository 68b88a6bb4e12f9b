// The convolution microkernel: weights are broadcast against a tile of outputs. For conv_run.cpp alone: functions are local.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "activation.h"
#include "conv_parts.h"
#include "planar_store.h"
#include "vec.h"

namespace fanin::conv::FANIN_WIDTH {
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
  // at: in units of kUnit bytes from x; opaque, so that it is the one index of all addresses. Pointer: they have none.
  static constexpr int64_t kUnit = R == 1 ? 1 : kLanes;
  template <int Row, bool Pointer = false>
  FANIN_INLINE void add(vf weight, const float* x, int64_t at, int64_t gap) {
#pragma GCC unroll 4
    for (int part = 0; part < P; ++part, at += gap) {
      asm("" : "+r"(at));
      const char* p = reinterpret_cast<const char*>(x) + at * kUnit;
      if constexpr (Pointer) asm("" : "+r"(p));
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) v[Row * kVectors + part * N + t] += weight * load_raw<vf>(p + t * sizeof(vf));
    }
  }
};

// Where rows that end in registers go: a tile of consecutive elements of each output channel.
struct Target {
  float* y;                     // of channel 0
  const float *residual, *bias;
  const int32_t* live;
  int64_t pixels;
  int64_t lanes;                // of the last vector; the others are whole
  float floor, ceiling;         // infinite, or what relu and relu6 clamp to
};

constexpr int kVisitsAhead = 4;

// Visits of one kind.
struct Runs {
  const uint16_t *count, *end, *rows;
  const void* offsets;          // from x: uint32_t, bytes; of runs side by side: uint16_t, kLanes bytes
  const uint16_t* last;         // of those: the last four of the weight
  const float *values, *x;
  float* sums;
  int64_t gap;                  // bytes between the parts of a tile
  bool request;                 // values and codes, of weights that come from beyond L2
  const uint16_t* codes;        // of the stage after this one, which are decoded at once
  bool fresh;                   // sums start from zero
  const Target* target;         // of runs that end their rows, or null: sums are kept
};

// f(i) for each i < N, a constant.
template <class F, int... I>
FANIN_INLINE void each_of(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
FANIN_INLINE void each(F&& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}

// Offsets of entries, in the order of the entries.
template <int R>
class Offsets;

// Of one run at a time: two ahead, and loaded in twos. Two more than there are must be readable.
template <>
class Offsets<1> {
 public:
  FANIN_INLINE explicit Offsets(const Runs& r)
      : at_(static_cast<const uint32_t*>(r.offsets)), next_{early<uint32_t>(at_), early<uint32_t>(at_ + 1)} {}
  template <class F>
  FANIN_INLINE void four(F&& f) {               // f(which of the four, offset)
    uint64_t pair = 0;
    each<4>([&](auto j) __attribute__((always_inline)) {
      const uint64_t offset = next_[j % 2];
      if constexpr (j % 2 == 0) pair = early<uint64_t>(at_ + j + 2);
      next_[j % 2] = j % 2 == 0 ? static_cast<uint32_t>(pair) : pair >> 32;
      f(j, offset);
    });
    at_ += 4;
  }
  FANIN_INLINE uint64_t one() {
    const uint64_t offset = next_[0];
    next_[0] = next_[1], next_[1] = early<uint32_t>(at_ + 2);
    ++at_;
    return offset;
  }
  FANIN_INLINE const void* position() const { return at_; }

 private:
  const uint32_t* at_;
  uint64_t next_[2];
};

// Of runs side by side: four ahead, in one load.
template <>
class Offsets<4> {
 public:
  FANIN_INLINE explicit Offsets(const Runs& r)
      : at_(static_cast<const uint16_t*>(r.offsets)), last_(r.last), next_(early<uint64_t>(at_)) {}
  template <class F>
  FANIN_INLINE void four(F&& f) {
    const uint64_t now = next_;
    at_ += 4;
    next_ = early<uint64_t>(std::min(at_, last_));
    each<4>([&](auto j) __attribute__((always_inline)) { f(j, now >> (16 * j) & 0xffff); });
  }
  FANIN_INLINE const void* position() const { return at_; }

 private:
  const uint16_t *at_, *last_;
  uint64_t next_;
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

// The same of sums in memory, the last vector of which is a part.
[[gnu::noinline]] void finish_part(const Target& o, const float* sums, int vectors, int32_t channel) {
  const vf bias = splat(o.bias ? o.bias[channel] : 0.0f);
  const int64_t first = channel * o.pixels, count = (vectors - 1) * kLanes + o.lanes;
  for (int64_t i = 0; i < count; i += kLanes) {
    vf v = load_raw<vf>(sums + i) + bias;
    if (o.residual) v += load_some(o.residual + first + i, count - i);
    store_some(o.y + first + i, clamp(v, o.floor, o.ceiling), count - i);
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

// The lines of as many entries as a run of `count` takes, some way behind it; without a loop, as runs take 10 to 40.
FANIN_INLINE void request_weights(const float* values, const uint16_t* codes, uint64_t count) {
  constexpr int64_t ahead = 512, line = 64;     // entries and bytes
  const auto request = [](const auto* p, int64_t bytes) { __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes); };
  request(values + ahead, 0), request(values + ahead, line), request(codes + ahead, 0);
  if (count > 2 * line / sizeof(float)) request(values + ahead, 2 * line), request(codes + ahead, line);
}

// As Weights4, for cores whose loads are cheap: each is broadcast from memory.
struct LoadedWeights4 {
  const float* p;
  FANIN_INLINE explicit LoadedWeights4(const float* weights) : p(weights) {}
  template <int J>
  FANIN_INLINE vf pick() const { return opaque(splat(p[J])); }
};

// CheapLoads: see Layout::cheap_loads; addresses have no index then, either.
template <int R, int P, int N, bool CheapLoads = false>
void accumulate(Runs& r) {
  static_assert(R == 1 || R == 4);
  using Weights = std::conditional_t<CheapLoads, LoadedWeights4, Weights4>;
  constexpr int kSums = P * N * kLanes;
  const float* w = r.values;
  const uint16_t* row = r.rows;
  const int64_t gap = r.gap;
  const float* x = r.x;
  float* kept = r.sums;
  const bool fresh = r.fresh, ends = r.target;
  const Target target = ends ? *r.target : Target{};
  if (r.count == r.end) return;
  Offsets<R> offsets(r);
  uint64_t next_row = early<uint16_t>(row), next_count = early<uint16_t>(r.count);
  for (const uint16_t* count = r.count; count < r.end; ++count, row += R) {
    const uint64_t one_row = next_row;
    uint64_t left = R * *count;
    if constexpr (R == 1) {     // behind the last visit, what stands there is read and not used
      left = next_count;
      next_row = early<uint16_t>(row + 1), next_count = early<uint16_t>(count + 1);
    }
    const auto row_of = [&](auto i) __attribute__((always_inline)) { return R == 1 ? one_row : row[i]; };
    if (ends && r.end - count > kVisitsAhead)
      each<R>([&](auto i) __attribute__((always_inline)) { prefetch<N>(target, target.live[row[kVisitsAhead * R + i]]); });
    if constexpr (R == 1)
      if (r.request) request_weights(w, r.codes + (w - r.values), left);
    Sums<R, P, N> sums;
    if (fresh) sums.clear();
    else each<R>([&](auto i) __attribute__((always_inline)) { sums.template load<i>(kept + row_of(i) * kSums); });
    for (; left >= 4; left -= 4, w += 4) {
      const Weights weights(w);
      offsets.four([&](auto j, uint64_t offset) __attribute__((always_inline)) {
        sums.template add<j % R, CheapLoads>(weights.template pick<j>(), x, static_cast<int64_t>(offset), gap);
      });
    }
    if constexpr (R == 1)
      for (; left > 0; --left, ++w) sums.template add<0>(splat(*w), x, static_cast<int64_t>(offsets.one()), gap);
    if (ends)
      each<R>([&](auto i) __attribute__((always_inline)) {
        // a missing run has the row of the next one, and must not be stored where y is the residual
        if (i + 1 < R && row[i] == row[i + 1]) return;
        const int32_t channel = target.live[row_of(i)];
        if (target.lanes == kLanes) return finish<i>(target, sums, channel);
        float* out = kept + row_of(i) * kSums;                // its own sums, which are done with
        sums.template store<i>(out);
        finish_part(target, out, P * N, channel);
      });
    else each<R>([&](auto i) __attribute__((always_inline)) { sums.template store<i>(kept + row_of(i) * kSums); });
  }
  r.codes += w - r.values, r.count = r.end, r.rows = row, r.offsets = offsets.position(), r.values = w;
}

using Kernel = void (*)(Runs&);

template <int P, int... N>
constexpr std::array<Kernel, kMaxTile> of_parts(std::integer_sequence<int, N...>) {
  return {[] {
    if constexpr ((N + 1) * P <= kMaxTile) return &accumulate<1, P, N + 1>;
    else return Kernel{};
  }()...};
}
template <bool CheapLoads, int... N>
constexpr std::array<Kernel, kNarrow> narrow_tiles(std::integer_sequence<int, N...>) {
  return {&accumulate<kTogether, 1, N + 1, CheapLoads>...};
}

Kernel kernel(const Tile& tile, const Layout& l) {
  using All = std::make_integer_sequence<int, kMaxTile>;
  static_assert(kMaxParts == 4);
  static constexpr std::array<std::array<Kernel, kMaxTile>, kMaxParts> wide{
      of_parts<1>(All{}), of_parts<2>(All{}), of_parts<3>(All{}), of_parts<4>(All{})};
  using Few = std::make_integer_sequence<int, kNarrow>;
  static constexpr std::array narrow{narrow_tiles<false>(Few{}), narrow_tiles<true>(Few{})};
  return l.together == 1 ? wide[tile.parts - 1][tile.vectors - 1] : narrow[l.cheap_loads][tile.vectors - 1];
}

}  // namespace
}  // namespace fanin::conv::bytesN
