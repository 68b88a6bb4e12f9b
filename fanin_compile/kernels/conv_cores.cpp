// What is told apart about cores, of those that run the same instructions.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "conv.h"

namespace fanin::conv {
namespace {

#if defined(__x86_64__)
constexpr unsigned kFamily = 0xf, kMoreFamily = 0xff;         // of leaf 1

// Zen 4 has AVX-512, but paths of 256 bits.
bool whole_vectors_take_twice() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kZen3And4 = 0x19;
  if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  return (a >> 8 & kFamily) + (a >> 20 & kMoreFamily) == kZen3And4;
}

bool loads_are_cheap_here() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvxVnni = 1 << 4;         // of leaf 7, part 1
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
}
#else
bool whole_vectors_take_twice() { return false; }
bool loads_are_cheap_here() { return false; }
#endif

}  // namespace

// Both are asked once: a virtual machine traps the question.
bool loads_are_cheap() {
  static const bool cheap = loads_are_cheap_here();
  return cheap;
}

const Kernels& kernels_for(const Shape& s) {
  static const bool twice = whole_vectors_take_twice();
  const Kernels* half = half_kernels();
  return half && twice && !s.pointwise() ? *half : whole_kernels();
}

}  // namespace fanin::conv
