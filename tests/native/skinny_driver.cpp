// Runs the dense kernel of few rows, without torch, on random odd shapes in exactly sized heap buffers and compares every output
// with a product in double. Built by test_native_drivers.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "skinny.cpp"

using namespace fanin;
namespace skinny = fanin::skinny;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }
float value() { return static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 500.0f; }

struct Case {
  int64_t rows, in, out, gap, parts;
  bool bias;
};

int64_t wrong(const Case& c) {
  const int64_t stride = c.in + c.gap;
  std::vector<float> x(std::max<int64_t>(0, (c.rows - 1) * stride + c.in)), weight(c.out * c.in), bias(c.out);
  std::vector<float> y(c.rows * c.out, NAN);
  for (auto* v : {&x, &weight, &bias})
    for (float& element : *v) element = value();
  const skinny::Op op{x.data(), weight.data(), c.bias ? bias.data() : nullptr, y.data(), c.rows, c.in, c.out, stride};
  for (int64_t part = 0; part < c.parts; ++part) skinny::run(op, c.out * part / c.parts, c.out * (part + 1) / c.parts);
  int64_t count = 0;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t n = 0; n < c.out; ++n) {
      double sum = c.bias ? bias[n] : 0.0, size = std::fabs(sum);
      for (int64_t k = 0; k < c.in; ++k) {
        const double product = static_cast<double>(x[r * stride + k]) * weight[n * c.in + k];
        sum += product, size += std::fabs(product);
      }
      const double allowed = static_cast<double>(c.in + 2) * std::numeric_limits<float>::epsilon() * size;
      count += !(std::fabs(y[r * c.out + n] - sum) <= allowed);
    }
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < cases; ++i) {
    Case c{pick({1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17}), pick({0, 1, 7, 16, 63, 64, 100}), pick({1, 2, 5, 7, 63, 64, 65, 100}), pick({0, 3}),
           1, rng() % 2 == 0};
    c.parts = std::min<int64_t>(c.out, pick({1, 2}));
    if (const int64_t count = wrong(c); count != 0) {
      std::printf("case %d has %ld wrong outputs: %ld rows of %ld to %ld, gap %ld, bias %d, parts %ld\n", i, count, c.rows, c.in,
                  c.out, c.gap, c.bias, c.parts);
      return 1;
    }
  }
  std::printf("%d cases at %d lanes\n", cases, kLanes);
}
