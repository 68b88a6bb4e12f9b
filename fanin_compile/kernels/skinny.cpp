// A dense layer of few batch rows: every weight is read once, in order, and multiplied with all rows while it is in a register.
#include "skinny.h"

#include <algorithm>
#include <array>
#include <utility>

#include "planar_store.h"

namespace fanin::skinny {
namespace {

constexpr int kLine = 64 / sizeof(float);
constexpr int kStep = kLanes > kLine ? kLanes : kLine;          // floats of a row between two requests
constexpr int64_t kBlockBytes = 128 << 10;                      // of a weight, in L2 for rows that take turns
constexpr int64_t kWhole = 12;                                  // neurons: some tiles, whatever their size

// Neurons of a tile: so many that sums, weights and one x stay in 16 registers.
template <int R>
constexpr int kNeurons = R <= 2 ? 4 : R == 3 ? 3 : 2;
// Neurons between what is read and what is requested, of rows that take no turns.
template <int R>
constexpr int64_t kAhead = kNeurons<R> == 2 ? 4 : kNeurons<R>;

// N neurons from n on, of R rows. Each sum is one chain of vectors in the order of the inputs, then its lanes: the bits depend
// neither on R nor on N.
template <int R, int N>
FANIN_INLINE void tile(const Op& op, const float* x, float* y, int64_t n, int64_t ahead) {
  const float* w = op.weight + n * op.in;
  vf sums[N][R] = {};
  int64_t i = 0;
  const auto step = [&](int64_t at, const auto& load) __attribute__((always_inline)) {
    vf weights[N];                              // opaque: they would be loaded again for each product, and loads are what limits a tile
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) weights[j] = opaque(load(w + j * op.in + at));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf row = opaque(load(x + r * op.x_stride + at));
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[j][r] = add_product(sums[j][r], weights[j], row);
    }
  };
  const auto whole = [](const float* p) __attribute__((always_inline)) { return load_raw<vf>(p); };
  for (; i + kStep <= op.in; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) __builtin_prefetch(w + (ahead + j) * op.in + i);
#pragma GCC unroll 16
    for (int t = 0; t < kStep; t += kLanes) step(i + t, whole);
  }
  for (; i + kLanes <= op.in; i += kLanes) step(i, whole);
  if (const int64_t rest = op.in - i; rest > 0)
    step(i, [rest](const float* p) __attribute__((always_inline)) { return load_part(p, rest); });
  for (int j = 0; j < N; ++j)
    for (int r = 0; r < R; ++r) {
      const float sum = sum_of(sums[j][r]);
      y[r * op.out + n + j] = op.bias ? sum + op.bias[n + j] : sum;
    }
}

// ahead: 0 for rows that take no turns.
template <int R>
void rows(const Op& op, int64_t row, int64_t first, int64_t last, int64_t ahead) {
  const float* x = op.x + row * op.x_stride;
  float* y = op.y + row * op.out;
  if (ahead == 0) ahead = kAhead<R>;
  int64_t n = first;
  for (; n + kNeurons<R> <= last; n += kNeurons<R>) tile<R, kNeurons<R>>(op, x, y, n, ahead);
  for (; n < last; ++n) tile<R, 1>(op, x, y, n, ahead);
}

using Rows = void (*)(const Op&, int64_t, int64_t, int64_t, int64_t);
template <int... R>
constexpr std::array<Rows, kMostRows> each(std::integer_sequence<int, R...>) {
  return {&rows<R + 1>...};
}

}  // namespace

void run(const Op& op, int64_t first, int64_t last) {
  static constexpr auto by_rows = each(std::make_integer_sequence<int, kMostRows>{});
  const int64_t turns = (op.rows + kMostRows - 1) / kMostRows;
  const int64_t bytes = std::max<int64_t>(op.in, 1) * kWhole * int64_t{sizeof(float)};
  const int64_t block = turns == 1 ? last - first : std::max<int64_t>(kBlockBytes / bytes, 1) * kWhole;
  for (int64_t n = first; n < last; n += block)
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t row = op.rows * turn / turns, count = op.rows * (turn + 1) / turns - row;
      by_rows[count - 1](op, row, n, std::min(n + block, last), turns == 1 ? 0 : block);
    }
}

}  // namespace fanin::skinny
