// What the depthwise and pooling kernels share: parts of vectors, and activations.
#pragma once

#include <algorithm>
#include <limits>

#include "activation.h"
#include "dispatch.h"
#include "vec.h"

namespace fanin {
inline namespace FANIN_WIDTH {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <int... I>
FANIN_INLINE vi count_up(std::integer_sequence<int, I...>) { return vi{I...}; }
FANIN_INLINE vi first_lanes(int64_t count) {
  const auto most = static_cast<int32_t>(std::clamp<int64_t>(count, 0, kLanes));
  return (vi)(count_up(std::make_integer_sequence<int, kLanes>{}) < most);
}

// N floats at a time, the last overlapping those before: no loop and no call.
template <int N = kLanes / 2>
FANIN_INLINE void copy_some(float* to, const float* from, int64_t count) {
  if constexpr (N >= 1) {
    if (count < N) return copy_some<N / 2>(to, from, count);
    __builtin_memcpy(to, from, N * sizeof(float));
    __builtin_memcpy(to + count - N, from + count - N, N * sizeof(float));
  }
}

// Fewer than kLanes floats, zeros behind.
FANIN_INLINE vf load_part(const float* p, int64_t count) {
  float buffer[kLanes] = {};
  copy_some(buffer, p, count);
  return load_raw<vf>(buffer);
}
FANIN_INLINE vf load_some(const float* p, int64_t count) {
  return count >= kLanes ? load_raw<vf>(p) : load_part(p, count);
}

FANIN_INLINE void store_some(float* p, vf v, int64_t count) {
  if (count >= kLanes) return store_raw(p, v);
  float buffer[kLanes];
  store_raw(buffer, v);
  copy_some(p, buffer, count);
}

// ---- activations -----------------------------------------------------------------------------------------------------

// none, relu and relu6 clamp in registers; the other activations go over finished rows, which are in L1.
struct Bounds {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  bool all = true;              // the whole activation

  explicit Bounds(Act act) : all(act == Act::none || act == Act::relu || act == Act::relu6) {
    if (act == Act::relu || act == Act::relu6) low = 0.0f;
    if (act == Act::relu6) high = 6.0f;
  }
};

inline void activate_all(Act act, float* y, int64_t count) {
  with_act(act, [&](auto known) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, count - i);
      store_some(y + i, activate<decltype(known)::value>(load_some(y + i, n)), n);
    }
  });
}

}  // namespace bytesN
}  // namespace fanin
