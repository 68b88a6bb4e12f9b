// What one core can do at most: the denominators of the benchmarks' roofline shares.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>

#include "vec.h"

#define FANIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fanin;
using Clock = std::chrono::steady_clock;

double ns_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

volatile float sink;  // what is stored here cannot be optimised away

// What gather kernels do at best: FMAs that load their operand, 12 vectors from each of many places in 16 KiB of x.
template <bool kAhead>
double gathered(int64_t rounds) {
  constexpr int kChains = 12, kPlaces = 256, kBytes = 1 << 14;
  alignas(64) static float x[kBytes / sizeof(float) + kChains * kLanes];
  std::fill(std::begin(x), std::end(x), 1.0f);  // never written, all of its pages would be one
  uint16_t offsets[kPlaces + 4] = {};           // bytes, of whole vectors
  for (int i = 0; i < kPlaces; ++i) offsets[i] = static_cast<uint16_t>(i * 40503 % kBytes / sizeof(vf) * sizeof(vf));
  vf acc[kChains] = {}, weight = splat(0.5f);
  const auto start = Clock::now();
  for (int64_t round = 0; round < rounds; ++round) {
    uint64_t next = early<uint64_t>(offsets);
    for (int i = 0; i < kPlaces; i += 4) {
      const uint64_t now = next;
      if (kAhead) next = early<uint64_t>(offsets + i + 4);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const uint64_t at = kAhead ? now >> (16 * j) & 0xffff : early<uint16_t>(offsets + i + j);
        const float* from = x + at / sizeof(float);
        asm volatile("" : "+r"(from));
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c) acc[c] += weight * load_raw<vf>(from + c * kLanes);
      }
    }
  }
  const double ns = ns_since(start);
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sink = sum_of(acc[c]);
  return double(rounds) * kPlaces * kChains * kLanes / ns;
}

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

// Multiply-adds per nanosecond whose operand is loaded from addresses that were loaded just before, or four places ahead.
FANIN_EXPORT double fanin_gathered_macs_per_ns(int64_t rounds, bool ahead) {
  return ahead ? gathered<true>(rounds) : gathered<false>(rounds);
}
