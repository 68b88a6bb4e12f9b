// The norm of a layer's input, computed where the input is packed: (x - mean) * scale * weight + bias, scale = 1 / deviation.
// A network that normalises what it reads (every transformer with norms before its layers) writes and reads nothing for it.
#include <cmath>

#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

// The sum of f(x) over one row; f maps vectors.
template <class X, class F>
float sum_row(const X* x, int64_t count, const F& f) {
  vf total[4] = {};                                           // hide the latency of additions
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) total[j] += f(widen<kLanes>(x + i + j * kLanes));
  for (; i + kLanes <= count; i += kLanes) total[0] += f(widen<kLanes>(x + i));
  vf sums = (total[0] + total[1]) + (total[2] + total[3]);
  for (; i < count; ++i) {
    vf one{};
    one[0] = widen1(x + i);
    sums[0] += f(one)[0];
  }
  return sum_of(sums);
}

}  // namespace

Moments moments(const Linear& op, int64_t b) {
  const int64_t in = op.weight->in;
  const float eps = op.norm[in], centred = op.norm[2 * in + 1];
  return with_dtype(op.x_type, [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(op.x) + b * op.x_stride;
    const auto count = static_cast<float>(in);
    const float mean = centred != 0 ? sum_row(x, in, [](vf v) { return v; }) / count : 0.0f;
    const float square = sum_row(x, in, [&](vf v) { return (v - mean) * (v - mean); }) / count;
    return Moments{mean, 1.0f / std::sqrt(square + eps)};
  });
}

}  // namespace fanin
