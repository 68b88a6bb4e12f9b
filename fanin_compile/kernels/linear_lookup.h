// Inputs by their columns, 64 at a time: x of a chunk stands in registers, one plane for each byte of its floats, and two
// byte permutes look up a byte of 64 columns. Needs AVX-512 VBMI.
#pragma once

#include "vec.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && FANIN_VEC_BYTES == 64
#define FANIN_LOOKUP 1

namespace fanin {

class Lookup {
 public:
  static constexpr int64_t kColumns = 256;      // what two permutes of two registers reach
  static constexpr int64_t kStep = 64;

  // x[0:count], count <= kColumns
  FANIN_INLINE Lookup(const float* x, int64_t count) {
    // the bytes of 16 floats by planes, then the planes of 64 floats side by side
    const __m512i by_plane = _mm512_load_si512(kByPlane);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t left = count - 64 * part - 16 * i;
        const auto some = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        v[i] = _mm512_permutexvar_epi8(by_plane, _mm512_maskz_loadu_epi32(some, x + 64 * part + 16 * i));
      }
      const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
      planes_[0][part] = _mm512_shuffle_i32x4(a, b, 0x88), planes_[1][part] = _mm512_shuffle_i32x4(a, b, 0xdd);
      planes_[2][part] = _mm512_shuffle_i32x4(c, d, 0x88), planes_[3][part] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
  }

  // out[i] = x[columns[i]] for i < count; up to kStep - 1 floats behind them are written, too.
  FANIN_INLINE void operator()(const uint8_t* columns, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; i += kStep) {
      const uint64_t some = count - i >= kStep ? ~uint64_t{0} : (uint64_t{1} << (count - i)) - 1;
      // dword 4 L + j moves to 4 j + L, where unpacking takes it from
      const __m512i c = _mm512_permutexvar_epi32(_mm512_load_si512(kTurned), _mm512_maskz_loadu_epi8(some, columns + i));
      const __mmask64 upper = _mm512_movepi8_mask(c);
      __m512i byte[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        byte[k] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(planes_[k][0], c, planes_[k][1]),
                                         _mm512_permutex2var_epi8(planes_[k][2], c, planes_[k][3]));
      const __m512i low0 = _mm512_unpacklo_epi8(byte[0], byte[1]), high0 = _mm512_unpackhi_epi8(byte[0], byte[1]);
      const __m512i low1 = _mm512_unpacklo_epi8(byte[2], byte[3]), high1 = _mm512_unpackhi_epi8(byte[2], byte[3]);
      _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(low0, low1));
      _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(low0, low1));
      _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(high0, high1));
      _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(high0, high1));
    }
  }

 private:
  alignas(64) static constexpr uint8_t kByPlane[64] = {
      0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
      2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
  alignas(64) static constexpr uint32_t kTurned[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  __m512i planes_[4][4];
};

}  // namespace fanin
#endif
