// Runs the depthwise kernels, without torch, on random odd geometries in exactly sized heap buffers and compares every output
// with a double-precision sum. Built by test_native_drivers.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "depthwise.cpp"
#include "depthwise_last.cpp"
#include "window.h"

using namespace fanin;
namespace depthwise = fanin::depthwise;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }

std::vector<float> values(int64_t count) {
  std::vector<float> v(count);
  for (float& x : v) x = static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 500.0f;
  return v;
}

struct Case {
  depthwise::Shape shape;
  int64_t batch;
  bool last;
};

Case random_case() {
  Case c;
  depthwise::Shape& s = c.shape;
  const bool square = rng() % 2;                // what strips know
  const int64_t kernel = pick({3, 3, 5, 7}), stride = pick({1, 2});
  for (int d = 0; d < 3; ++d) {
    const bool used = d == 2 || (d == 1 && (square || rng() % 3)) || (d == 0 && !square && rng() % 4 == 0);
    s.kernel[d] = !used ? 1 : square ? kernel : pick({1, 2, 3, 5, 31});
    s.stride[d] = !used ? 1 : square ? stride : pick({1, 1, 2, 3});
    s.dilation[d] = !used || square ? 1 : pick({1, 1, 2, 3});
    s.before[d] = used ? pick({0, 0, 1, 2, 5}) : 0;
    const int64_t after = used ? pick({0, 0, 1, 2, 9}) : 0, reach = s.dilation[d] * (s.kernel[d] - 1) + 1;
    const int64_t least = std::max<int64_t>(1, reach - s.before[d] - after);
    s.in[d] = used ? least + pick({0, 1, 6, 7, 13, d == 0 ? int64_t{2} : int64_t{63}}) : 1;
    s.out[d] = (s.in[d] + s.before[d] + after - reach) / s.stride[d] + 1;
  }
  c.last = rng() % 3 == 0;
  s.channels = pick({1, 3, 8, 17}), s.multiplier = c.last ? 1 : pick({1, 1, 1, 2, 3});
  c.batch = pick({1, 2, 3});
  return c;
}

double worst_excess(const Case& c) {
  const depthwise::Shape& s = c.shape;
  const int64_t in = s.pixels_in(), out = s.pixels_out(), outs = s.out_channels();
  const std::vector<float> x = values(c.batch * s.channels * in), weight = values(outs * s.taps()), bias = values(outs);
  const std::vector<float> residual = values(c.batch * outs * out);
  std::vector<float> y(residual.size(), NAN);
  const bool biased = rng() % 2, added = rng() % 2;
  const Act act = std::vector<Act>{Act::none, Act::relu, Act::relu6, Act::hardswish}[rng() % 4];
  const depthwise::Op op{s, x.data(), weight.data(), biased ? bias.data() : nullptr, added ? residual.data() : nullptr,
                         y.data(), c.batch, act};
  const int64_t items = c.last ? c.batch * s.out[0] * s.out[1] : c.batch * outs;
  const int64_t floats = c.last ? depthwise::scratch_floats_last(s) : depthwise::scratch_floats(s);
  const int64_t parts = std::min<int64_t>(items, pick({1, 2, 5}));
  for (int64_t part = 0; part < parts; ++part) {
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
    std::fill(scratch, scratch + floats, NAN);
    (c.last ? depthwise::run_rows : depthwise::run_planes)(op, items * part / parts, items * (part + 1) / parts, scratch);
    std::free(scratch);
  }

  const auto at = [&](int64_t image, int64_t channel, int64_t pixel, int64_t channels, int64_t pixels) {
    return c.last ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
  };
  double worst = 0;
  for (int64_t image = 0; image < c.batch; ++image)
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t p = 0; p < out; ++p) {
        double sum = biased ? bias[o] : 0.0, magnitude = std::fabs(sum);
        for (int64_t t = 0; t < s.taps(); ++t) {
          const int64_t from = element_under(s, p, t);
          if (from < 0) continue;
          const double product = static_cast<double>(weight[o * s.taps() + t]) * x[at(image, o / s.multiplier, from, s.channels, in)];
          sum += product, magnitude += std::fabs(product);
        }
        const int64_t to = at(image, o, p, outs, out);
        if (added) sum += residual[to], magnitude += std::fabs(residual[to]);
        double expected = sum;
        if (act == Act::relu) expected = std::max(sum, 0.0);
        if (act == Act::relu6) expected = std::clamp(sum, 0.0, 6.0);
        if (act == Act::hardswish) expected = sum * std::clamp(sum + 3.0, 0.0, 6.0) / 6.0;
        const double bound = 2.0 * static_cast<double>(s.taps() + 4) * 1.2e-7 * (magnitude + std::fabs(expected)) + 1e-30;
        const double excess = std::fabs(y[to] - expected) / bound;
        worst = std::isnan(excess) ? INFINITY : std::max(worst, excess);
      }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case();
    const double excess = worst_excess(c);
    if (excess <= 1.0) continue;
    const depthwise::Shape& s = c.shape;
    std::printf("case %d is %g times the bound: in %ld %ld %ld kernel %ld %ld %ld stride %ld %ld %ld before %ld %ld %ld out %ld "
                "%ld %ld channels %ld * %ld, batch %ld%s\n",
                i, excess, s.in[0], s.in[1], s.in[2], s.kernel[0], s.kernel[1], s.kernel[2], s.stride[0], s.stride[1],
                s.stride[2], s.before[0], s.before[1], s.before[2], s.out[0], s.out[1], s.out[2], s.channels, s.multiplier,
                c.batch, c.last ? ", channels_last" : "");
    return 1;
  }
  std::printf("%d cases at %d lanes\n", cases, kLanes);
}
