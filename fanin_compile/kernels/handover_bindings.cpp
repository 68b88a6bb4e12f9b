// How long a cache line takes from one thread's core to another's: what benchmarks on several threads say of the host.
#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPatience = std::chrono::seconds(1);           // until a thread that shares its core is given up

// Until the line says so, or for too long.
bool comes(const std::atomic<int64_t>& line, int64_t turn, Clock::time_point deadline) {
  for (int64_t i = 1; line.load(std::memory_order_acquire) != turn; ++i)
    if (i % 65536 == 0 && Clock::now() > deadline) return false;
  return true;
}

}  // namespace

// Nanoseconds one way, of the first two threads of torch's pool, each of which answers the other `rounds` times. NaN where there
// is one thread, or where they do not run at once.
extern "C" __attribute__((visibility("default"))) double fanin_handover_ns(int64_t rounds) {
  alignas(128) std::atomic<int64_t> line{0};
  alignas(128) std::atomic<bool> whole{true};
  double ns = 0;
  if (at::get_num_threads() < 2) return std::numeric_limits<double>::quiet_NaN();
  at::parallel_for(0, 2, 1, [&](int64_t first, int64_t last) {
    if (last - first > 1) whole = false;
    const auto start = Clock::now();
    const bool second = first == 1;
    for (int64_t i = 0; i < rounds && whole; ++i) {
      if (!comes(line, 2 * i + second, start + kPatience)) whole = false;
      line.store(2 * i + second + 1, std::memory_order_release);
    }
    if (second) ns = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
  });
  return whole ? ns / static_cast<double>(2 * rounds) : std::numeric_limits<double>::quiet_NaN();
}
