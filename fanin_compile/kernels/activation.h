// Activations on vectors of fp32, as polynomials. Bounds, checked against fp64 in the tests:
// sigmoid, tanh, silu: 4 ulp;  both gelu: 4 eps |x| (like torch's own, they lose digits where the result is far below x).
#pragma once

#include "linear.h"
#include "vec.h"

namespace fanin {
inline namespace FANIN_WIDTH {

FANIN_INLINE vf clamp(vf x, float low, float high) { return at_most(at_least(x, splat(low)), splat(high)); }

// exp(x) = 2^n exp(r), |r| <= ln2 / 2: Cody-Waite reduction, polynomial of Cephes expf. Saturates at 2^-126 and 2^127.
FANIN_INLINE vf exp(vf x) {
  x = clamp(x, -87.33654f, 88.02969f);
  const vf magic = splat(12582912.0f);                        // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (vf)((vi)p + (((vi)shifted) << 23));                 // the low bits of shifted are n
}

// 0 below -88, where exp saturates: x * sigmoid(x) must vanish for any x down there.
FANIN_INLINE vf sigmoid(vf x) { return select<kLanes>(x < -88.02969f, splat(0.0f), 1.0f / (1.0f + exp(-x))); }

FANIN_INLINE vf tanh(vf x) {
  const vi sign = (vi)x & INT32_MIN;
  const vf a = (vf)((vi)x ^ sign);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf small = x + x * z * p;
  const vf large = (vf)((vi)(1.0f - 2.0f / (exp(2.0f * a) + 1.0f)) | sign);
  return select<kLanes>(a < 0.625f, small, large);
}

// Rational minimax approximation on [-4, 4] (the coefficients of Eigen's generic_fast_erf_float).
FANIN_INLINE vf erf(vf x) {
  x = clamp(x, -4.0f, 4.0f);
  const vf z = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * z - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  return x * p / q;
}

template <Act A>
FANIN_INLINE vf activate(vf x) {
  if constexpr (A == Act::relu) return at_least(x, splat(0.0f));
  if constexpr (A == Act::relu6) return clamp(x, 0.0f, 6.0f);
  if constexpr (A == Act::gelu) return 0.5f * x * (1.0f + erf(x * 0.70710678f));
  if constexpr (A == Act::gelu_tanh)                          // 0.5 (1 + tanh u) = sigmoid(2 u)
    return x * sigmoid(x * (1.59576912f + 0.0713548162f * (x * x)));
  if constexpr (A == Act::silu) return x * sigmoid(x);
  if constexpr (A == Act::hardswish) return x * (clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
  if constexpr (A == Act::sigmoid) return sigmoid(x);
  if constexpr (A == Act::tanh) return tanh(x);
  return x;
}

}  // namespace bytesN
}  // namespace fanin
