// Max pooling of planar x: the maxima of the rows under the kernel into one padded row, then those of its neighbouring
// columns. Both are the elementwise maximum of a few rows, the second of one row shifted.
#include "pool.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "planar_store.h"

namespace fanin::pool {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// All ones, which is a NaN, where a or b is one.
FANIN_INLINE vi unordered(vf a, vf b) {
#if FANIN_VEC_BYTES == 32 && defined(__AVX__)                  // one instruction; the compiler finds three
  return (vi)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
#else
  return (vi)(a != a) | (vi)(b != b);
#endif
}

// The maximum of load(0), load(1) ... load(N - 1), of `count` of them if N is 0. at_least() loses every NaN but
// the first's.
template <int N, class Load>
FANIN_INLINE vf largest(int64_t count, const Load& load) {
  const int64_t n = N ? N : count;
  vf most = load(0);
  vi nan{};
  for (int64_t i = 1; i < n; i += 2) {
    const vf a = load(i), b = i + 1 < n ? load(i + 1) : a;
    most = at_least(at_least(most, a), b);
    nan |= unordered(a, b);
  }
  return (vf)((vi)most | nan);
}
template <int N>
FANIN_INLINE vf largest_at(const float* const* rows, int64_t count, int64_t at) {
  return largest<N>(count, [&](int64_t i) __attribute__((always_inline)) { return load_raw<vf>(rows[i] + at); });
}

// Calls f with N for largest_at() and with the rows, in registers where they are few.
template <class F>
FANIN_INLINE void with_rows(const float* const* rows, int64_t count, const F& f) {
  const auto call = [&](auto n) __attribute__((always_inline)) {
    const float* few[decltype(n)::value];
    std::copy_n(rows, decltype(n)::value, few);
    f(n, few);
  };
  switch (count) {
    case 1: return call(std::integral_constant<int, 1>{});
    case 2: return call(std::integral_constant<int, 2>{});
    case 3: return call(std::integral_constant<int, 3>{});
    default: f(std::integral_constant<int, 0>{}, rows);
  }
}

// The last vector of a row overlaps the one before it.
FANIN_INLINE int64_t begin(int64_t i, int64_t width) { return std::min(i, width - kLanes); }

void maxima_of_rows(const float* const* rows, int64_t count, float* to, int64_t width) {
  if (count == 0) {
    std::fill_n(to, width, kLowest);
  } else if (width < kLanes) {
    store_some(to, largest<0>(count, [&](int64_t i) { return load_some(rows[i], width); }), width);
  } else {
    with_rows(rows, count, [&](auto n, const float* const* from) __attribute__((always_inline)) {
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t at = begin(i, width);
        store_raw(to + at, largest_at<decltype(n)::value>(from, count, at));
      }
    });
  }
}

// Every S-th maximum of columns, clamped: y[i] of taps[...][S * i].
template <int S>
void maxima_of_columns(const float* const* taps, int64_t count, float* y, int64_t width, float low, float high) {
  with_rows(taps, count, [&](auto n, const float* const* from) __attribute__((always_inline)) {
    constexpr int N = decltype(n)::value;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t to = std::max<int64_t>(begin(i, width), 0), at = S * to;
      vf most = largest_at<N>(from, count, at);
      if constexpr (S == 2) most = every_second<0>(most, largest_at<N>(from, count, at + kLanes));
      store_some(y + to, clamp(most, low, high), width);
    }
  });
}

// What one call has in scratch: two padded rows, of which the next is written before the last is read again. Loads at
// other offsets than a store's wait until the store has left its buffer.
struct Rows {
  int64_t pitch, positions;     // of columns of which maxima are wanted

  explicit Rows(const Shape& s) : positions((s.out[2] - 1) * s.stride[2] + 1) {
    const int64_t vectors = s.stride[2] * round_up(std::max<int64_t>(s.out[2], kLanes), kLanes);
    const int64_t read = vectors + (s.kernel[2] - 1) * s.dilation[2];
    pitch = round_up(std::max(read, s.before[2] + s.in[2]), kLanes);
  }
};

}  // namespace

int64_t scratch_floats(const Shape& s) { return (s.stride[2] > 2 ? 3 : 2) * Rows(s).pitch; }

void run_planes(const Op& op, int64_t first, int64_t last, float* scratch) {
  const Shape& s = op.shape;
  const Rows rows(s);
  float* const padded[2] = {scratch, scratch + rows.pitch};
  float* const all = scratch + 2 * rows.pitch;                  // maxima at every column, for strides beyond two
  std::fill(scratch, all, kLowest);
  std::vector<const float*> under(s.kernel[0] * s.kernel[1]);   // the kernel: rows of x
  std::vector<const float*> taps[2];
  for (int half = 0; half < 2; ++half)
    for (int64_t k = 0; k < s.kernel[2]; ++k) taps[half].push_back(padded[half] + k * s.dilation[2]);
  const Bounds bounds(s.stride[2] > 2 ? Act::none : op.act);
  const int64_t lines = s.out[0] * s.out[1];

  const auto down = [&](const float* plane, int64_t line) {
    const int64_t front = line / s.out[1] * s.stride[0] - s.before[0], top = line % s.out[1] * s.stride[1] - s.before[1];
    int64_t count = 0;
    for (int64_t kz = 0; kz < s.kernel[0]; ++kz) {
      const int64_t z = front + kz * s.dilation[0];
      if (z < 0 || z >= s.in[0]) continue;
      for (int64_t ky = 0; ky < s.kernel[1]; ++ky) {
        const int64_t row = top + ky * s.dilation[1];
        if (row >= 0 && row < s.in[1]) under[count++] = plane + (z * s.in[1] + row) * s.in[2];
      }
    }
    maxima_of_rows(under.data(), count, padded[line & 1] + s.before[2], s.in[2]);
  };
  const auto across = [&](float* y, int64_t line) {
    const float* const* from = taps[line & 1].data();
    if (s.stride[2] == 1) return maxima_of_columns<1>(from, s.kernel[2], y, s.out[2], bounds.low, bounds.high);
    if (s.stride[2] == 2) return maxima_of_columns<2>(from, s.kernel[2], y, s.out[2], bounds.low, bounds.high);
    for (int64_t i = 0; i < rows.positions; i += kLanes) store_raw(all + i, largest_at<0>(from, s.kernel[2], i));
    for (int64_t i = 0; i < s.out[2]; ++i) y[i] = all[i * s.stride[2]];
  };

  for (int64_t p = first; p < last; ++p) {
    const float* x = op.x + p * s.pixels_in();
    float* y = op.y + p * s.pixels_out();
    down(x, 0);
    for (int64_t line = 0; line < lines; ++line) {
      if (line + 1 < lines) down(x, line + 1);
      across(y + line * s.out[2], line);
    }
    if (!bounds.all || s.stride[2] > 2) activate_all(op.act, y, s.pixels_out());
  }
}

}  // namespace fanin::pool
