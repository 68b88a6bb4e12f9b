// Runs the max pooling kernel, without torch, on random odd geometries in exactly sized heap buffers and compares every output
// with the maximum taken one element at a time. Built by test_native_drivers.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "pool.cpp"
#include "window.h"

using namespace fanin;
namespace pool = fanin::pool;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }

struct Case {
  pool::Shape shape;
  int64_t planes;
  Act act;
};

Case random_case() {
  Case c;
  pool::Shape& s = c.shape;
  for (int d = 0; d < 3; ++d) {
    const bool used = d == 2 || (d == 1 && rng() % 4) || (d == 0 && rng() % 4 == 0);
    s.kernel[d] = used ? pick({1, 2, 3, 3, 4, 5, 17}) : 1;
    s.stride[d] = used ? pick({1, 2, 2, 3, 5}) : 1;
    s.dilation[d] = used ? pick({1, 1, 2, 3}) : 1;
    const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1;
    s.before[d] = used ? static_cast<int64_t>(rng() % (s.kernel[d] / 2 + 1)) : 0;
    // behind as much as in front, and up to a stride less one where sizes are rounded up
    const int64_t after = s.before[d] + static_cast<int64_t>(rng() % s.stride[d]);
    const int64_t least = std::max<int64_t>(1, reach - s.before[d] - after);
    s.in[d] = used ? least + pick({0, 1, 6, 7, 13, d == 0 ? int64_t{2} : int64_t{63}}) : 1;
    s.out[d] = (s.in[d] + s.before[d] + after - reach) / s.stride[d] + 1;
  }
  c.planes = pick({1, 2, 5});
  c.act = std::vector<Act>{Act::none, Act::relu, Act::relu6}[rng() % 3];
  return c;
}

float value() {
  switch (rng() % 40) {
    case 0: return NAN;
    case 1: return -INFINITY;
    case 2: return INFINITY;
    default: return static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 100.0f;
  }
}

bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : a == b; }

int64_t wrong(const Case& c) {
  const pool::Shape& s = c.shape;
  std::vector<float> x(c.planes * s.pixels_in()), y(c.planes * s.pixels_out(), 12345.0f);
  for (float& v : x) v = value();
  const pool::Op op{s, x.data(), y.data(), c.act};
  const int64_t floats = pool::scratch_floats(s), parts = std::min<int64_t>(c.planes, pick({1, 2}));
  for (int64_t part = 0; part < parts; ++part) {
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
    std::fill(scratch, scratch + floats, NAN);
    pool::run_planes(op, c.planes * part / parts, c.planes * (part + 1) / parts, scratch);
    std::free(scratch);
  }
  int64_t count = 0;
  for (int64_t to = 0; to < static_cast<int64_t>(y.size()); ++to) {
    const int64_t plane = to / s.pixels_out(), p = to % s.pixels_out();
    float most = -INFINITY;
    for (int64_t t = 0; t < s.taps(); ++t) {
      const int64_t from = element_under(s, p, t);
      if (from < 0) continue;
      const float v = x[plane * s.pixels_in() + from];
      if (v > most || std::isnan(v)) most = v;
    }
    if (c.act != Act::none && most < 0.0f) most = 0.0f;
    if (c.act == Act::relu6 && most > 6.0f) most = 6.0f;
    count += !same(y[to], most);
  }
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case();
    const int64_t count = wrong(c);
    if (count == 0) continue;
    const pool::Shape& s = c.shape;
    std::printf("case %d has %ld wrong outputs: in %ld %ld %ld kernel %ld %ld %ld stride %ld %ld %ld before %ld %ld %ld "
                "dilation %ld %ld %ld out %ld %ld %ld, planes %ld\n",
                i, count, s.in[0], s.in[1], s.in[2], s.kernel[0], s.kernel[1], s.kernel[2], s.stride[0], s.stride[1],
                s.stride[2], s.before[0], s.before[1], s.before[2], s.dilation[0], s.dilation[1], s.dilation[2], s.out[0],
                s.out[1], s.out[2], c.planes);
    return 1;
  }
  std::printf("%d cases at %d lanes\n", cases, kLanes);
}
