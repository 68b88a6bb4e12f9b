// Epilogues: sums -> bias, residual, activation, storage type -> y. Ablated outputs are met here as rows of zeros.
#include <cstdlib>
#include <memory>
#include <new>

#include "activation.h"
#include "dispatch.h"
#include "linear.h"
#include "vec.h"

namespace fanin {
namespace {

float bias_at(const Linear& op, int64_t o) {
  return with_dtype(op.bias_type, [&](auto zero) { return widen1(static_cast<const decltype(zero)*>(op.bias) + o); });
}

template <Act A, class X>
void row(const Linear& op, int64_t b, const float* sums, int64_t first, int64_t last) {
  const int64_t stop = op.out_end(last);
  X* y = static_cast<X*>(op.y) + b * op.out;
  const X* residual = op.residual ? static_cast<const X*>(op.residual) + b * op.out : nullptr;
  int64_t r = first;
  for (int64_t o = op.out_begin(first); o < stop; o += kLanes) {
    const int64_t count = stop - o < kLanes ? stop - o : kLanes;
    const bool whole = count == kLanes;
    vf v{};
    if (!op.rows && whole) {
      v = load_raw<vf>(sums + (o - first));
    } else {
      for (int64_t i = 0; i < count; ++i)
        if (r < last && (op.rows ? op.rows[r] : r) == o + i) v[i] = sums[r++ - first];
    }
    if (op.bias) {
      if (whole)
        v += with_dtype(op.bias_type, [&](auto z) { return widen<kLanes>(static_cast<const decltype(z)*>(op.bias) + o); });
      else
        for (int64_t i = 0; i < count; ++i) v[i] += bias_at(op, o + i);
    }
    if (residual) {
      if (whole) v += widen<kLanes>(residual + o);
      else
        for (int64_t i = 0; i < count; ++i) v[i] += widen1(residual + o + i);
    }
    v = activate<A>(v);
    if (whole) narrow<kLanes>(y + o, v);
    else
      for (int64_t i = 0; i < count; ++i) narrow1(y + o + i, v[i]);
    if (!op.rows && whole) r += kLanes;
  }
}

template <class X, int B = 0>
FANIN_INLINE void store_pieces(X* y, int64_t step, vf v) {
  narrow<kPiece>(y + B * step, piece<B>(v));
  if constexpr (B + 1 < kLanes / kPiece) store_pieces<X, B + 1>(y, step, v);
}

// kPiece outputs from o on, of kLanes lanes; src[i] is where output o + i keeps its lanes.
template <Act A, class X>
FANIN_INLINE void block(const Linear& op, int64_t lane, int64_t lanes, const float* const* src, vf bias, int64_t o,
                        int64_t outs) {
  vf v[kPiece];
  for (int i = 0; i < kPiece; ++i) v[i] = load_raw<vf>(src[i]);
  transpose_pieces(v);                                        // piece b of v[i]: outputs o..o+3 of lane b * kPiece + i
  X* y = static_cast<X*>(op.y) + lane * op.out + o;
  const X* residual = op.residual ? static_cast<const X*>(op.residual) + lane * op.out + o : nullptr;
  if (lanes >= kLanes && outs == kPiece) {
    for (int i = 0; i < kPiece; ++i) {
      v[i] += bias;
      if (residual)
        v[i] += gather_pieces<kLanes>(0, [&](int b) { return widen<kPiece>(residual + (b * kPiece + i) * op.out); });
      store_pieces(y + i * op.out, kPiece * op.out, activate<A>(v[i]));
    }
    return;
  }
  for (int i = 0; i < kPiece; ++i) {
    v[i] += bias;
    for (int b = 0; b < kLanes / kPiece; ++b)
      if (residual && b * kPiece + i < lanes)
        for (int64_t j = 0; j < outs; ++j) v[i][b * kPiece + j] += widen1(residual + (b * kPiece + i) * op.out + j);
    v[i] = activate<A>(v[i]);
    for (int b = 0; b < kLanes / kPiece; ++b)
      if (b * kPiece + i < lanes)
        for (int64_t j = 0; j < outs; ++j) narrow1(y + (b * kPiece + i) * op.out + j, v[i][b * kPiece + j]);
  }
}

alignas(64) constexpr float kZeros[kLanes] = {};

template <Act A, class X>
void tile(const Linear& op, int64_t lane, int64_t lanes, const float* sums, int64_t stride, int64_t first, int64_t last) {
  constexpr int64_t kLine = 16;                               // outputs of one cache line, finished lane group by lane group
  const int64_t stop = op.out_end(last);
  const float* src[kLine];
  vf bias[kLine / kPiece];
  int64_t r = first;
  for (int64_t line = op.out_begin(first); line < stop; line += kLine) {
    const int64_t outs = stop - line < kLine ? stop - line : kLine;
    for (int64_t i = 0; i < kLine; ++i) {
      const bool alive = i < outs && r < last && (op.rows ? op.rows[r] : r) == line + i;
      src[i] = alive ? sums + (r++ - first) * stride : kZeros;
    }
    for (int64_t i = 0; i < kLine; i += kPiece) {
      vp part{};
      if (op.bias)
        for (int64_t j = 0; j < kPiece && i + j < outs; ++j) part[j] = bias_at(op, line + i + j);
      bias[i / kPiece] = repeat(part);
    }
    for (int64_t g = 0; g < lanes; g += kLanes) {
      for (int64_t i = 0; i < outs; i += kPiece) {
        const float* at[kPiece];
        for (int j = 0; j < kPiece; ++j) at[j] = src[i + j] == kZeros ? kZeros : src[i + j] + g;
        block<A, X>(op, lane + g, lanes - g, at, bias[i / kPiece], line + i, outs - i < kPiece ? outs - i : kPiece);
      }
    }
  }
}

}  // namespace

void finish_row(const Linear& op, int64_t b, const float* sums, int64_t first, int64_t last) {
  with_dtype(op.x_type, [&](auto x) {
    with_act(op.act, [&](auto act) { row<act.value, decltype(x)>(op, b, sums, first, last); });
  });
}

void finish_tile(const Linear& op, int64_t lane, int64_t lanes, const float* sums, int64_t stride, int64_t first,
                 int64_t last) {
  with_dtype(op.x_type, [&](auto x) {
    with_act(op.act, [&](auto act) { tile<act.value, decltype(x)>(op, lane, lanes, sums, stride, first, last); });
  });
}

void widen_row(const void* x, DType type, int64_t count, float* out) {
  with_dtype(type, [&](auto zero) {
    const auto* p = static_cast<const decltype(zero)*>(x);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) narrow<kLanes>(out + i, widen<kLanes>(p + i));
    for (; i < count; ++i) out[i] = widen1(p + i);
  });
}

float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (floats > size) {
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    size = floats;
  }
  return buffer.get();
}

}  // namespace fanin
