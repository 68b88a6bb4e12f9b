// The inner loops of the planar depthwise kernel: lanes are neighbouring pixels of an output row.
#pragma once

#include <algorithm>
#include <array>

#include "depthwise.h"
#include "planar_store.h"

namespace fanin::depthwise {

inline constexpr int kStrip = 4;                // output rows at a time: with nine weights and an input, 14 registers
inline constexpr int kRun = 8;                  // output vectors at a time where rows are not shared, against latency

// The outputs of a plane's rows. A vector wider than a row is stored whole where rows follow that overwrite what is too
// much of it.
struct Plane {
  float* y;
  const float* residual;        // or null
  int64_t width, size;          // of a row, and of all
  float low, high;
  vf bias;

  bool plain() const { return !residual && width >= kLanes; }
  FANIN_INLINE void put(int64_t at, vf v) const {
    const bool part = width < kLanes && at + kLanes > size;
    if (residual) v += load_some(residual + at, part ? width : kLanes);
    v = clamp(v, low, high);
    if (part) store_some(y + at, v, width);
    else store_raw(y + at, v);
  }
  // The last vector overlaps the one before it.
  FANIN_INLINE int64_t begin(int64_t x) const { return std::max<int64_t>(std::min(x, width - kLanes), 0); }
};

// One vector, at x, of each of R output rows, out of (R - 1) * S + K input rows that they share: an input vector is loaded
// once. put(r, sum) takes the sums.
template <int K, int S, int R, class Put>
FANIN_INLINE void sweep(const float* const (&in)[(R - 1) * S + K], const vf (&w)[K * K], vf bias, int64_t odd, int64_t x,
                        const Put& put) {
  vf sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sums[r] = bias;
#pragma GCC unroll 16
  for (int i = 0; i < (R - 1) * S + K; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      // opaque, or it is loaded anew for each row
      const vf pixels = opaque(load_raw<vf>(in[i] + x + (S == 1 ? k : k / 2 + (k % 2 ? odd : 0))));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        if (i >= r * S && i < r * S + K) sums[r] += w[(i - r * S) * K + k] * pixels;
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) put(r, sums[r]);
}

// R output rows from `row` on.
template <int K, int S, int R>
void strip(const Plane& plane, int64_t row, const float* const* rows, const int64_t* tap, const float* weight) {
  vf w[K * K];
  for (int k = 0; k < K * K; ++k) w[k] = splat(weight[k]);
  const float* in[(R - 1) * S + K];
  for (int i = 0; i < (R - 1) * S + K; ++i) in[i] = rows[i] + tap[0];
  const int64_t odd = S == 1 ? 0 : tap[1] - tap[0], width = plane.width, at = row * width;
  const vf bias = plane.bias, low = splat(plane.low), high = splat(plane.high);
  if (!plane.plain()) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const int64_t from = plane.begin(x);
      sweep<K, S, R>(in, w, bias, odd, from, [&](int r, vf v) { plane.put(at + r * width + from, v); });
    }
    return;
  }
  for (int64_t x = 0; x < width; x += kLanes) {
    const int64_t from = std::min(x, width - kLanes);
    float* y = plane.y + at + from;
    sweep<K, S, R>(in, w, bias, odd, from, [&](int r, vf v) __attribute__((always_inline)) {
      v = select<kLanes>(v < low, low, v);
      store_raw(y + r * width, select<kLanes>(v > high, high, v));
    });
  }
}

using Strip = decltype(&strip<3, 1, 1>);

template <int K, int S>
constexpr std::array<Strip, kStrip> kStrips = {strip<K, S, 1>, strip<K, S, 2>, strip<K, S, 3>, strip<K, S, 4>};

// Null where no strip knows the kernel.
inline const Strip* strips_of(const Shape& s) {
  const bool square = s.kernel[0] == 1 && s.kernel[1] == s.kernel[2] && s.stride[1] == s.stride[2];
  if (!square || s.dilation[1] != 1 || s.dilation[2] != 1 || s.stride[1] > 2) return nullptr;
  const bool one = s.stride[1] == 1;
  switch (s.kernel[2]) {
    case 3: return one ? kStrips<3, 1>.data() : kStrips<3, 2>.data();
    case 5: return one ? kStrips<5, 1>.data() : kStrips<5, 2>.data();
    case 7: return one ? kStrips<7, 1>.data() : kStrips<7, 2>.data();
    default: return nullptr;
  }
}

// T vectors of one output row, whatever the kernel: rows[taps / kernel[2]].
template <int T>
void run(const Shape& s, const Plane& plane, int64_t row, int64_t begin, const float* const* rows, const int64_t* tap,
         const float* weight) {
  vf sums[T];
  int64_t x[T];
  for (int t = 0; t < T; ++t) sums[t] = plane.bias, x[t] = plane.begin(begin + t * kLanes);
  const int64_t lines = s.kernel[0] * s.kernel[1];
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t k = 0; k < s.kernel[2]; ++k) {
      const vf w = splat(*weight++);
      const float* in = rows[i] + tap[k];
      // opaque, or GCC makes no FMA of what a loop sums up
      for (int t = 0; t < T; ++t) sums[t] = opaque(sums[t]) + w * load_raw<vf>(in + x[t]);
    }
  for (int t = 0; t < T; ++t) plane.put(row * plane.width + x[t], sums[t]);
}

inline void run_line(const Shape& s, const Plane& plane, int64_t row, const float* const* rows, const int64_t* tap,
                     const float* weight) {
  static constexpr std::array<decltype(&run<1>), kRun> kRuns = {run<1>, run<2>, run<3>, run<4>,
                                                                run<5>, run<6>, run<7>, run<8>};
  const int64_t vectors = (plane.width + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; v += kRun)
    kRuns[std::min<int64_t>(kRun, vectors - v) - 1](s, plane, row, v * kLanes, rows, tap, weight);
}

}  // namespace fanin::depthwise
