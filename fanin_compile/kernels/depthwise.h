// Interface of the depthwise convolution kernels: plain data, no torch headers. Derivations: DEPTHWISE.md.
#pragma once

#include <array>
#include <cstdint>

#include "linear.h"

namespace fanin::depthwise {

using Dims = std::array<int64_t, 3>;            // depth, height, width; 1d and 2d fill the front with ones

struct Shape {
  int64_t channels, multiplier; // of x, and outputs of each
  Dims in, kernel, stride, before, dilation, out;             // before: zeros in front of x; those behind follow from out

  int64_t out_channels() const { return channels * multiplier; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels_in() const { return in[0] * in[1] * in[2]; }
  int64_t pixels_out() const { return out[0] * out[1] * out[2]; }
};

// y = act(conv(x) + bias + residual), all fp32; output channel o reads input channel o / multiplier.
struct Op {
  Shape shape;
  const float* x;               // [batch, channels, *in], planar or, with a multiplier of 1, channels_last
  const float* weight;          // [out_channels, *kernel]
  const float* bias;            // [out_channels] or null
  const float* residual;        // as y, or null
  float* y;                     // [batch, out_channels, *out] in x's memory format; every element is written
  int64_t batch;
  Act act;
};

// Floats of scratch that one call of either function needs on its thread.
int64_t scratch_floats(const Shape& shape);
int64_t scratch_floats_last(const Shape& shape);
// Planar: planes [first, last) of y's batch * out_channels.
void run_planes(const Op& op, int64_t first, int64_t last, float* scratch);
// channels_last: rows [first, last) of y's batch * out[0] * out[1].
void run_rows(const Op& op, int64_t first, int64_t last, float* scratch);

}  // namespace fanin::depthwise
