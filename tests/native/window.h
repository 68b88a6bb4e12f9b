// What the drivers of the planar kernels share: which element of a plane a tap of the kernel reads.
#pragma once

#include <array>
#include <cstdint>

// For the output at position `output` of a plane; -1 in padding. Shape: that of the depthwise or of the pooling kernels.
template <class Shape>
int64_t element_under(const Shape& s, int64_t output, int64_t tap) {
  const std::array<int64_t, 3> pixel{output / (s.out[1] * s.out[2]), output / s.out[2] % s.out[1], output % s.out[2]};
  const std::array<int64_t, 3> k{tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
  int64_t from = 0;
  for (int d = 0; d < 3; ++d) {
    const int64_t i = pixel[d] * s.stride[d] + k[d] * s.dilation[d] - s.before[d];
    if (i < 0 || i >= s.in[d]) return -1;
    from = from * s.in[d] + i;
  }
  return from;
}
