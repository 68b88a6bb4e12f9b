// Interface of the planar max pooling kernel: plain data, no torch headers. Derivations: POOL.md.
#pragma once

#include <array>
#include <cstdint>

#include "linear.h"

namespace fanin::pool {

using Dims = std::array<int64_t, 3>;            // depth, height, width; 1d and 2d fill the front with ones

struct Shape {
  Dims in, kernel, stride, before, dilation, out;             // before: padding in front of x; that behind follows from out

  int64_t pixels_in() const { return in[0] * in[1] * in[2]; }
  int64_t pixels_out() const { return out[0] * out[1] * out[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// y = act(maximum of the elements of x under the kernel); NaN where one of them is, -inf where there is none.
struct Op {
  Shape shape;
  const float* x;               // [planes, *in]
  float* y;                     // [planes, *out]; every element is written
  Act act;
};

// Floats of scratch that a call needs on its thread.
int64_t scratch_floats(const Shape& shape);
// Planes [first, last).
void run_planes(const Op& op, int64_t first, int64_t last, float* scratch);

}  // namespace fanin::pool
