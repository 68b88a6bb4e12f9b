// Depthwise convolution of channels_last x: the lanes are channels, taps beyond the image are left out.
#include <algorithm>

#include "depthwise.h"
#include "planar_store.h"

namespace fanin::depthwise {
namespace {

// Taps [first, last) of a dimension that lie inside the input, for the output at `out`.
struct Range {
  int64_t first, last;
  Range(const Shape& s, int d, int64_t out) {
    const int64_t from = out * s.stride[d] - s.before[d], step = s.dilation[d];
    first = from < 0 ? std::min((-from + step - 1) / step, s.kernel[d]) : 0;
    last = from >= s.in[d] ? first : std::min(s.kernel[d], (s.in[d] - 1 - from) / step + 1);
    last = std::max(first, last);
  }
};

}  // namespace

int64_t scratch_floats_last(const Shape& shape) { return shape.taps() * round_up(shape.channels, kLanes); }

void run_rows(const Op& op, int64_t first, int64_t last, float* scratch) {
  const Shape& s = op.shape;
  const int64_t channels = s.channels, padded = round_up(channels, kLanes), taps = s.taps();
  const Bounds bounds(op.act);
  for (int64_t t = 0; t < taps; ++t)            // [taps][channels], so that a tap's weights are neighbours
    for (int64_t c = 0; c < padded; ++c) scratch[t * padded + c] = c < channels ? op.weight[c * taps + t] : 0.0f;
  for (int64_t row = first; row < last; ++row) {
    const int64_t image = row / (s.out[0] * s.out[1]), z = row / s.out[1] % s.out[0], y = row % s.out[1];
    const Range in_z(s, 0, z), in_y(s, 1, y);
    const int64_t z0 = z * s.stride[0] - s.before[0], y0 = y * s.stride[1] - s.before[1];
    for (int64_t x = 0; x < s.out[2]; ++x) {
      const Range in_x(s, 2, x);
      const int64_t x0 = x * s.stride[2] - s.before[2], at = (row * s.out[2] + x) * channels;
      const auto pixel = [&](int64_t c, const auto& load, const auto& store) __attribute__((always_inline)) {
        vf sum = op.bias ? load(op.bias + c) : vf{};
        for (int64_t kz = in_z.first; kz < in_z.last; ++kz)
          for (int64_t ky = in_y.first; ky < in_y.last; ++ky) {
            const int64_t line = (image * s.in[0] + z0 + kz * s.dilation[0]) * s.in[1] + y0 + ky * s.dilation[1];
            const float* from = op.x + (line * s.in[2] + x0) * channels + c;
            const float* w = scratch + ((kz * s.kernel[1] + ky) * s.kernel[2]) * padded + c;
            for (int64_t kx = in_x.first; kx < in_x.last; ++kx)
              sum = opaque(sum) + load_raw<vf>(w + kx * padded) * load(from + kx * s.dilation[2] * channels);
          }
        if (op.residual) sum += load(op.residual + at + c);
        store(op.y + at + c, clamp(sum, bounds.low, bounds.high));
      };
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) pixel(c, load_raw<vf, float>, store_raw<vf, float>);
      if (c < channels)
        pixel(c, [&](const float* p) { return load_part(p, channels - c); },
              [&](float* p, vf v) { store_some(p, v, channels - c); });
    }
    if (!bounds.all) activate_all(op.act, op.y + row * s.out[2] * channels, s.out[2] * channels);
  }
}

}  // namespace fanin::depthwise
