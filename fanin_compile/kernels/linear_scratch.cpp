// Scratch memory of the linear kernels: allocated by each thread for itself, kept, and grown where a call needs more.
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "linear.h"

namespace fanin {
namespace {

constexpr int64_t kLine = 64;
std::atomic<int64_t> most{0};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

float* scratch(int64_t floats, int buffer) {
  thread_local std::unique_ptr<float, Free> buffers[3];
  thread_local int64_t sizes[3] = {0, 0, 0};                  // in bytes
  const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + kLine - 1) / kLine * kLine;
  if (bytes > sizes[buffer]) {
    buffers[buffer].reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
    if (!buffers[buffer]) throw std::bad_alloc();
    sizes[buffer] = bytes;
    const int64_t now = sizes[0] + sizes[1] + sizes[2];
    for (int64_t before = most; before < now && !most.compare_exchange_weak(before, now);) {
    }
  }
  return buffers[buffer].get();
}

int64_t scratch_nbytes() { return most; }

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE); told > 0) return told;
#endif
    return int64_t{512 << 10};
  }();
  return bytes;
}

}  // namespace fanin
