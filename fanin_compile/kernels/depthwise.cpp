// Depthwise convolution of planar x. Input rows are copied once into a ring of zero-padded rows, out of which strips of up
// to four output rows are computed (depthwise_strip.h).
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "depthwise_rows.h"
#include "depthwise_strip.h"

namespace fanin::depthwise {
namespace {

// Output rows [row, row + count) of a slice, and the padded input rows [first, last) that they need beyond those before.
struct Step {
  int64_t row, count, first, last;
};

std::vector<Step> steps_of(const Shape& s, bool strips) {
  std::vector<Step> steps;
  const int64_t reach = (s.kernel[1] - 1) * s.dilation[1];
  for (int64_t row = 0, packed = 0, count = 0; row < s.out[1]; row += count) {
    const int64_t left = s.out[1] - row;        // four and three rows, not four, two and one
    count = !strips ? 1 : left <= kStrip ? left : left < 2 * kStrip ? left / 2 : kStrip;
    const int64_t last = (row + count - 1) * s.stride[1] + reach + 1;
    steps.push_back({row, count, std::max(packed, row * s.stride[1]), last});
    packed = last;
  }
  return steps;
}

// Where the padded input rows of a slice stand: in a ring, as its steps are taken in turn and each is packed during the
// one before it. Loads of what was just stored at another offset would wait for the stores.
struct Ring {
  int64_t rows;                 // that a slice's outputs read
  std::vector<float*> at;       // [2][kernel[0]][rows], zeros where a row is padding; slices alternate
  float* zeros;

  Ring(const Shape& s, int64_t pitch, float* scratch)
      : rows((s.out[1] - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1), zeros(scratch) {
    const int64_t depth = depth_of(s);
    for (int64_t half = 0; half < 2 * s.kernel[0]; ++half)
      for (int64_t i = 0; i < rows; ++i) {
        const bool inside = i >= s.before[1] && i < s.before[1] + s.in[1];
        at.push_back(inside ? scratch + (1 + half * depth + i % depth) * pitch : zeros);
      }
  }
  static int64_t depth_of(const Shape& s) {
    const int64_t rows = strips_of(s) ? kStrip : 1;
    return (2 * rows - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
  }
};

int64_t row_copy(const Shape& s) { return round_up(s.in[2] + Packer::kBeyond, kLanes); }

}  // namespace

int64_t scratch_floats(const Shape& s) {
  return (2 * s.kernel[0] * Ring::depth_of(s) + 1) * RowLayout(s).pitch + row_copy(s);
}

void run_planes(const Op& op, int64_t first, int64_t last, float* scratch) {
  const Shape& s = op.shape;
  const RowLayout layout(s);
  const Packer pack(layout, s);
  const Ring ring(s, layout.pitch, scratch);
  const Strip* strips = strips_of(s);
  const std::vector<Step> steps = steps_of(s, strips);
  const Bounds bounds(op.act);
  const int64_t channels = s.out_channels(), out = s.pixels_out(), in = s.pixels_in(), lines = s.kernel[0] * s.kernel[1];
  const float* x_end = op.x + op.batch * s.channels * in;
  float* copy = scratch + scratch_floats(s) - row_copy(s);
  std::fill(scratch, copy, 0.0f);

  const auto slice = [&](int64_t z, int64_t kz) {               // of x, -1 if it is padding
    const int64_t at = z * s.stride[0] + kz * s.dilation[0] - s.before[0];
    return at < s.in[0] ? std::max<int64_t>(at, -1) : -1;
  };
  const auto rows_at = [&](int64_t p, int64_t z, int64_t kz, int64_t row) {
    return ring.at.data() + ((((p * s.out[0] + z) & 1) * s.kernel[0] + kz) * ring.rows + row);
  };
  const auto prepare = [&](int64_t p, int64_t z, const Step& step) {
    const int64_t top = std::max(step.first, s.before[1]), count = std::min(step.last, s.before[1] + s.in[1]) - top;
    for (int64_t kz = 0; kz < s.kernel[0]; ++kz) {
      const int64_t from = slice(z, kz);
      if (from < 0 || count <= 0) continue;
      const float* plane = op.x + (s.multiplier == 1 ? p : p / s.multiplier) * in;
      const float* x = plane + (from * s.in[1] + top - s.before[1]) * s.in[2];
      float* const* to = rows_at(p, z, kz, top);
      if (x_end - x >= count * s.in[2] + Packer::kBeyond) {
        pack(x, to, count);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          std::copy_n(x + i * s.in[2], s.in[2], copy);
          pack(copy, to + i, 1);
        }
      }
    }
  };
  std::vector<const float*> rows(lines);
  const auto compute = [&](int64_t p, int64_t channel, int64_t z, const Step& step) {
    const int64_t top = step.row * s.stride[1];
    const float* weight = op.weight + channel * s.taps();
    const Plane plane{op.y + p * out, op.residual ? op.residual + p * out : nullptr, s.out[2], out, bounds.low, bounds.high,
                      splat(op.bias ? op.bias[channel] : 0.0f)};
    if (strips) return strips[step.count - 1](plane, step.row, rows_at(p, z, 0, top), layout.tap.data(), weight);
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t kz = i / s.kernel[1], ky = i % s.kernel[1];
      rows[i] = slice(z, kz) < 0 ? ring.zeros : *rows_at(p, z, kz, top + ky * s.dilation[1]);
    }
    run_line(s, plane, z * s.out[1] + step.row, rows.data(), layout.tap.data(), weight);
  };

  prepare(first, 0, steps[0]);
  for (int64_t p = first, channel = first % channels; p < last; ++p, channel = channel + 1 == channels ? 0 : channel + 1) {
    for (int64_t z = 0; z < s.out[0]; ++z)
      for (size_t i = 0; i < steps.size(); ++i) {
        if (i + 1 < steps.size()) prepare(p, z, steps[i + 1]);
        else if (z + 1 < s.out[0]) prepare(p, z + 1, steps[0]);
        else if (p + 1 < last) prepare(p + 1, 0, steps[0]);
        compute(p, channel, z, steps[i]);
      }
    if (!bounds.all) activate_all(op.act, op.y + p * out, out);
  }
}

}  // namespace fanin::depthwise
