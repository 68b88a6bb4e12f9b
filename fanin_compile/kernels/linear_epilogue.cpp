// Epilogues: sums -> bias, residual, activation, storage type -> y.
#include "activation.h"
#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

// Outputs finished at a time. A tile is first transposed into a buffer of so many outputs a lane, then stored in whole
// cache lines: rows of y are often a multiple of 4096 bytes apart, so that 8 of them compete for the same 8 ways of L1.
constexpr int64_t kSpan = 64;
alignas(64) constexpr float kZeros[kSpan] = {};

// y[0:count] = act(sums + bias + residual)
using Span = void (*)(const float* sums, const float* bias, const void* residual, void* y, int64_t count);

template <Act A, class X>
void span(const float* sums, const float* bias, const void* residual_, void* y_, int64_t count) {
  const X* residual = static_cast<const X*>(residual_);
  X* y = static_cast<X*>(y_);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    vf v = load_raw<vf>(sums + i) + load_raw<vf>(bias + i);
    if (residual) v += widen<kLanes>(residual + i);
    narrow<kLanes>(y + i, activate<A>(v));
  }
  if (i == count) return;
  vf v{};
  for (int64_t j = 0; i + j < count; ++j) {
    v[j] = sums[i + j] + bias[i + j];
    if (residual) v[j] += widen1(residual + i + j);
  }
  v = activate<A>(v);
  for (int64_t j = 0; i + j < count; ++j) narrow1(y + i + j, v[j]);
}

// What every epilogue of one call shares.
struct Epilogue {
  const Linear& op;
  Span span;
  int64_t size;                                               // bytes of one element of y
  alignas(64) float wide_bias[kSpan];

  explicit Epilogue(const Linear& op) : op(op), size(op.x_type == DType::f32 ? 4 : 2) {
    span = with_dtype(op.x_type, [&](auto x) {
      return with_act(op.act, [&](auto act) -> Span { return &fanin::span<act.value, decltype(x)>; });
    });
  }
  // bias[o : o + count] in fp32
  const float* bias(int64_t o, int64_t count) {
    if (!op.bias) return kZeros;
    if (op.bias_type == DType::f32) return static_cast<const float*>(op.bias) + o;
    widen_row(static_cast<const uint16_t*>(op.bias) + o, op.bias_type, count, wide_bias);
    return wide_bias;
  }
  void finish(int64_t b, int64_t o, int64_t count, const float* sums, const float* bias) const {
    const int64_t at = (b * op.weight->out + o) * size;
    span(sums, bias, op.residual ? static_cast<const char*>(op.residual) + at : nullptr, static_cast<char*>(op.y) + at, count);
  }
};

template <Act A>
void hidden_row(const float* sums, const float* bias, int64_t rows, bool times, float* h) {
  if (!times) return span<A, float>(sums, bias, nullptr, h, rows);
  for (int64_t r = 0; r < rows; ++r) h[r] *= sums[r] + bias[r];
}

}  // namespace

void finish_row(const Linear& op, int64_t b, const float* sums, int64_t first, int64_t last) {
  Epilogue epilogue(op);
  for (int64_t o = first; o < last; o += kSpan) {
    const int64_t count = last - o < kSpan ? last - o : kSpan;
    epilogue.finish(b, o, count, sums + (o - first), epilogue.bias(o, count));
  }
}

void finish_tile(const Linear& op, int64_t lane, int64_t lanes, const float* sums, int64_t first, int64_t last) {
  Epilogue epilogue(op);
  const Tiling& tiling = tiling_for(op.batch);
  const int64_t stride = tiling.stride_of(lanes);
  alignas(64) float turned[kLanes][kSpan];
  for (int64_t o = first; o < last; o += kSpan) {
    const int64_t count = last - o < kSpan ? last - o : kSpan;
    const float* bias = epilogue.bias(o, count);
    for (int64_t g = 0; g < lanes; g += tiling.lanes) {
      tiling.turn(sums + (o - first) * stride + g, stride, count, kSpan, turned[0]);
      const int64_t used = lanes - g < tiling.lanes ? lanes - g : tiling.lanes;
      for (int64_t i = 0; i < used; ++i) epilogue.finish(lane + g + i, o, count, turned[i], bias);
    }
  }
}

void finish_hidden(const Chain& chain, int64_t lanes, const float* sums, int64_t first, int64_t last, float* h) {
  const Structure &w = *chain.first.weight, &reader = *chain.second.weight;
  const Tiling& tiling = tiling_for(chain.first.batch);
  const int64_t stride = lanes ? tiling.stride_of(lanes) : 1, gates = chain.gated ? w.out / 2 : w.out;
  Epilogue epilogue(chain.first);
  for (int64_t r = first; r < last;) {
    const bool times = r >= gates;                            // the other factor of a gate that stands in h already
    const int64_t column = times ? r - gates : r, in_chunk = reader.width - column % reader.width;
    int64_t rows = last - r < in_chunk ? last - r : in_chunk;  // as far as h has no gap, and the bias no more than a span
    if (!times && gates - r < rows) rows = gates - r;
    if (rows > kSpan) rows = kSpan;
    const float* from = sums + (r - first) * stride;
    float* to = h + slot(reader, column) * stride;
    const Act act = times ? Act::none : chain.first.act;
    const float* bias = epilogue.bias(r, rows);
    if (lanes) tiling.hidden(act, from, bias, rows, stride, times, to);
    else with_act(act, [&](auto kAct) { hidden_row<kAct.value>(from, bias, rows, times, to); });
    r += rows;
  }
}

void widen_row(const void* x, DType type, int64_t count, float* out) {
  with_dtype(type, [&](auto zero) {
    const auto* p = static_cast<const decltype(zero)*>(x);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) narrow<kLanes>(out + i, widen<kLanes>(p + i));
    for (; i < count; ++i) out[i] = widen1(p + i);
  });
}

}  // namespace fanin
