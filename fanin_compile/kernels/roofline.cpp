// What one core can do at most: the denominators of the benchmarks' roofline shares.
#include <chrono>
#include <cstdint>

#include "vec.h"

#define FANIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fanin;
using Clock = std::chrono::steady_clock;

double ns_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

float sum_of(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

volatile float sink;  // what is stored here cannot be optimised away

}  // namespace

// Multiply-adds per nanosecond: 12 independent chains cover a latency of 4 to 6 cycles at two a cycle.
FANIN_EXPORT double fanin_peak_macs_per_ns(int64_t rounds) {
  constexpr int kChains = 12;
  vf acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = splat(1.0f + c);
  const vf scale = splat(0.999f), shift = splat(1e-3f);
  const auto start = Clock::now();
  for (int64_t i = 0; i < rounds; ++i)
    for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * scale + shift;
  const double ns = ns_since(start);
  for (int c = 0; c < kChains; ++c) sink = sum_of(acc[c]);
  return double(rounds) * kChains * kLanes / ns;
}

// Bytes per nanosecond of reading n floats one after the other, `rounds` times.
FANIN_EXPORT double fanin_read_bytes_per_ns(const float* data, int64_t n, int64_t rounds) {
  constexpr int kStreams = 4;
  vf acc[kStreams] = {};
  const int64_t step = kStreams * kLanes, end = n / step * step;
  const auto start = Clock::now();
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i < end; i += step)
      for (int s = 0; s < kStreams; ++s) acc[s] += load_raw<vf>(data + i + s * kLanes);
  const double ns = ns_since(start);
  for (int s = 0; s < kStreams; ++s) sink = sum_of(acc[s]);
  return double(rounds) * end * sizeof(float) / ns;
}
