// Padded rows of x, as the planar depthwise kernel reads them.
#pragma once

#include <algorithm>
#include <vector>

#include "depthwise.h"
#include "planar_store.h"

namespace fanin::depthwise {

// A padded row: the pixels p of the padded input with p % stride == phase stand side by side, for each phase that a tap
// uses, so that the taps of neighbouring outputs are neighbours.
struct RowLayout {
  struct Phase {
    int64_t column, at;         // the first column of x in it, and its place in the row
  };
  std::vector<Phase> phases;
  std::vector<int64_t> tap;     // [kernel[2]] from an output's place to its tap's
  int64_t columns;              // of x that any output reads
  int64_t pitch;                // floats of a row, those of all phases

  explicit RowLayout(const Shape& s) {
    const int64_t stride = s.stride[2], left = s.before[2], taps = s.kernel[2], dilation = s.dilation[2];
    const int64_t reach = (taps - 1) * dilation;
    columns = std::clamp<int64_t>((s.out[2] - 1) * stride + reach + 1 - left, 0, s.in[2]);
    const int64_t read = std::max<int64_t>(s.out[2], kLanes) + reach / stride, written = (columns + left) / stride;
    const int64_t room = round_up(std::max(read, written) + 3 * kLanes, kLanes);
    std::vector<int64_t> index(std::min(stride, reach + 1), -1);
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t phase = k * dilation % stride, shift = k * dilation / stride;
      const int64_t column = ((phase - left) % stride + stride) % stride, place = (column + left) / stride;
      const int64_t margin = round_up(place, kLanes) - place;  // packing stores whole aligned vectors
      if (index[phase] < 0) {
        index[phase] = static_cast<int64_t>(phases.size());
        phases.push_back({column, index[phase] * room + margin + place});
      }
      tap.push_back(index[phase] * room + margin + shift);
    }
    pitch = static_cast<int64_t>(phases.size()) * room;
  }
};

template <int H, int... I>
FANIN_INLINE vf every_second(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + H)...);
}

// Copies rows of x. Reads up to two vectors beyond them and writes zeros there, in the padding or where nobody reads.
class Packer {
 public:
  static constexpr int64_t kBeyond = 2 * kLanes;

  Packer(const RowLayout& l, const Shape& s)
      : layout_(l), width_(s.in[2]), stride_(s.stride[2]), pairs_(stride_ == 2 && l.phases.size() == 2) {
    const int64_t rest = l.columns % (pairs_ ? 2 * kLanes : kLanes);
    whole_ = l.columns - rest;
    tails_[0] = first_lanes(rest), tails_[1] = first_lanes(rest - kLanes);
  }

  // Row i to rows[i].
  void operator()(const float* x, float* const* rows, int64_t count) const {
    // copies that no store can change
    const int64_t width = width_, whole = whole_, columns = layout_.columns;
    const vi tail0 = tails_[0], tail1 = tails_[1];
    if (stride_ == 1) {
      const int64_t at = layout_.phases[0].at;
      for (int64_t r = 0; r < count; ++r, x += width) {
        float* to = rows[r] + at;
        for (int64_t i = 0; i < whole; i += kLanes) store_raw(to + i, load_raw<vf>(x + i));
        if (whole < columns) store_raw(to + whole, keep<kLanes>(tail0, load_raw<vf>(x + whole)));
      }
    } else if (pairs_) {
      const bool swap = layout_.phases[0].column == 1;
      const int64_t even = layout_.phases[swap].at, odd = layout_.phases[!swap].at;
      for (int64_t r = 0; r < count; ++r, x += width) {
        float* to = rows[r];
        const auto deal = [&](int64_t i, vf a, vf b) __attribute__((always_inline)) {
          store_raw(to + even + i / 2, every_second<0>(a, b, std::make_integer_sequence<int, kLanes>{}));
          store_raw(to + odd + i / 2, every_second<1>(a, b, std::make_integer_sequence<int, kLanes>{}));
        };
        for (int64_t i = 0; i < whole; i += 2 * kLanes) deal(i, load_raw<vf>(x + i), load_raw<vf>(x + i + kLanes));
        if (whole < columns)
          deal(whole, keep<kLanes>(tail0, load_raw<vf>(x + whole)),
               keep<kLanes>(tail1, load_raw<vf>(x + whole + kLanes)));
      }
    } else {
      for (int64_t r = 0; r < count; ++r, x += width)
        for (const auto& phase : layout_.phases) {
          float* to = rows[r] + phase.at;
          for (int64_t i = phase.column; i < columns; i += stride_) *to++ = x[i];
        }
    }
  }

 private:
  const RowLayout& layout_;
  int64_t width_, stride_, whole_;
  bool pairs_;
  vi tails_[2];
};

}  // namespace fanin::depthwise
