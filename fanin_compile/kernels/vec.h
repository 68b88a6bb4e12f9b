// One vector vocabulary for every ISA: GCC/Clang vector extensions, width chosen by FANIN_VEC_BYTES.
//   64: AVX-512   32: AVX, AVX2   16: SSE2, NEON   4: one float at a time (any CPU)
// The width may exceed what the CPU has (the compiler splits the operations), so every width is tested on every host.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if !defined(FANIN_VEC_BYTES)
#if defined(__AVX512F__)
#define FANIN_VEC_BYTES 64
#elif defined(__AVX__)
#define FANIN_VEC_BYTES 32
#elif defined(__SSE2__) || defined(__ARM_NEON)
#define FANIN_VEC_BYTES 16
#else
#define FANIN_VEC_BYTES 4
#endif
#endif

// linear_tiles_half.cpp and conv_half.cpp compile their kernels a second time, on half the registers of AVX-512.
#if defined(FANIN_HALF_VECTORS) && FANIN_VEC_BYTES == 64
#define FANIN_HALVED
#undef FANIN_VEC_BYTES
#define FANIN_VEC_BYTES 32
#endif

#define FANIN_INLINE inline __attribute__((always_inline))
#define FANIN_JOIN_(a, b) a##b
#define FANIN_JOIN(a, b) FANIN_JOIN_(a, b)
#define FANIN_WIDTH FANIN_JOIN(bytes, FANIN_VEC_BYTES)

namespace fanin {
inline namespace FANIN_WIDTH {               // names of two widths in one library are different names

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

inline constexpr int kLanes = FANIN_VEC_BYTES / 4;          // floats in one vector
inline constexpr int kPiece = kLanes < 4 ? kLanes : 4;      // floats in one 128-bit piece of it
using vf = Vec<float, kLanes>;
using vi = Vec<int32_t, kLanes>;
using vp = Vec<float, kPiece>;                              // a piece: what a transposing load or store touches in one row

// Storage types; arithmetic is always fp32.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ---- whole vectors -------------------------------------------------------------------------------------------------

template <int N>
FANIN_INLINE Vec<float, N> splat(float a) { return a - Vec<float, N>{}; }
FANIN_INLINE vf splat(float a) { return splat<kLanes>(a); }

template <class V, class T>
FANIN_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
FANIN_INLINE void store_raw(T* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }

// Copies past the caches, for what nobody reads soon: the lines of `to` are not fetched before they are written. Others see
// them after stream_end().
inline void stream_copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
#if defined(__AVX__)
  constexpr int64_t kWide = 8;
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(float) % kWide);
  for (; i < count && (past + i) % kWide; ++i) to[i] = from[i];
  for (; i + kWide <= count; i += kWide) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#endif
  __builtin_memcpy(to + i, from + i, (count - i) * sizeof(float));
}
FANIN_INLINE void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// mask lanes are all ones or all zeros, as comparisons give them
template <int N>
FANIN_INLINE Vec<float, N> select(Vec<int32_t, N> mask, Vec<float, N> a, Vec<float, N> b) { return mask ? a : b; }
template <int N>
FANIN_INLINE Vec<float, N> keep(Vec<int32_t, N> mask, Vec<float, N> a) {
  return (Vec<float, N>)((Vec<int32_t, N>)a & mask);       // a bit mask, not a product: a NaN in a dropped lane stays out
}

// Bounds which let a NaN through, as the x86 instructions do when it is their second operand.
FANIN_INLINE vf at_least(vf x, vf low) {
#if FANIN_VEC_BYTES == 64 && defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)low, (__m512)x);
#elif FANIN_VEC_BYTES == 32 && defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return select<kLanes>(x < low, low, x);
#endif
}
FANIN_INLINE vf at_most(vf x, vf high) {
#if FANIN_VEC_BYTES == 64 && defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)high, (__m512)x);
#elif FANIN_VEC_BYTES == 32 && defined(__AVX__)
  return (vf)_mm256_min_ps((__m256)high, (__m256)x);
#else
  return select<kLanes>(x > high, high, x);
#endif
}

// ---- half precision: generic over N, the F16C instruction where the CPU has it ----------------------------------------

template <int N>
FANIN_INLINE Vec<float, N> widen(const float* p) { return load_raw<Vec<float, N>>(p); }

template <int N>
FANIN_INLINE Vec<float, N> widen(const bf16* p) {
#if defined(__AVX512F__)                                       // the compiler converts in several parts, all of these
  if constexpr (N == 16)
    return (Vec<float, N>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(p)), 16);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8)
    return (Vec<float, N>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(p)), 16);
  if constexpr (N == 4)
    return (Vec<float, N>)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16);
#endif
  const auto h = load_raw<Vec<uint16_t, N>>(p);
  return (Vec<float, N>)(__builtin_convertvector(h, Vec<uint32_t, N>) << 16);
}

template <int N>
FANIN_INLINE Vec<float, N> widen(const f16* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vec<float, N>)_mm512_cvtph_ps(load_raw<__m256i>(p));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return (Vec<float, N>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  if constexpr (N == 4) return (Vec<float, N>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  using U = Vec<uint32_t, N>;
  const U h = __builtin_convertvector(load_raw<Vec<uint16_t, N>>(p), U);
  const U magnitude = (h & 0x7fffu) << 13;
  // scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals exact
  const U scaled = (U)((Vec<float, N>)magnitude * 0x1p112f);
  const U special = (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (Vec<float, N>)(scaled | special | ((h & 0x8000u) << 16));
}

template <int N>
FANIN_INLINE void narrow(float* p, Vec<float, N> v) { store_raw(p, v); }

template <int N>
FANIN_INLINE void narrow(bf16* p, Vec<float, N> v) {
  using U = Vec<uint32_t, N>;
  const U u = (U)v;
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;   // to nearest, ties to even
  const U quiet = (u >> 16) | 0x40u;
  const U nan = (U)((u & 0x7fffffffu) > 0x7f800000u);
  store_raw(p, __builtin_convertvector((rounded & ~nan) | (quiet & nan), Vec<uint16_t, N>));
}

template <int N>
FANIN_INLINE void narrow(f16* p, Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  if constexpr (N == 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  using U = Vec<uint32_t, N>;
  const U u = (U)v;
  const U sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const U normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const U tiny = (U)((Vec<float, N>)a + 0.5f) - 0x3f000000u;  // adding 0.5 rounds at 2^-24, the subnormal spacing
  const U is_tiny = (U)(a < (113u << 23)), is_big = (U)(a >= 0x477ff000u), is_nan = (U)(a > 0x7f800000u);
  U h = (tiny & is_tiny) | (normal & ~is_tiny);
  h = (h & ~is_big) | (0x7c00u & is_big);
  h = (h & ~is_nan) | (0x7e00u & is_nan);
  store_raw(p, __builtin_convertvector(h | sign, Vec<uint16_t, N>));
}

template <class T>
FANIN_INLINE float widen1(const T* p) { return widen<1>(p)[0]; }
template <class T>
FANIN_INLINE void narrow1(T* p, float v) { narrow<1>(p, Vec<float, 1>{v}); }

// ---- pieces: a vector is kLanes / kPiece pieces of kPiece floats -------------------------------------------------------

namespace detail {
template <int... I>
FANIN_INLINE vf repeat(vp p, std::integer_sequence<int, I...>) { return __builtin_shufflevector(p, p, (I % kPiece)...); }
template <int J, int... I>
FANIN_INLINE vf pick(vf v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / kPiece * kPiece + J)...);
}
template <int M, int... I>
FANIN_INLINE Vec<float, 2 * M> concat(Vec<float, M> a, Vec<float, M> b, std::integer_sequence<int, I...>) {
#if defined(__AVX512F__)                                      // the compiler goes through memory, and waits for it
  if constexpr (M == 8)
    return (Vec<float, 2 * M>)_mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512((__m256)a)), _mm256_castps_pd((__m256)b), 1));
#endif
  return __builtin_shufflevector(a, b, I...);
}
template <int B, int... I>
FANIN_INLINE vp piece(vf v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (B * kPiece + I)...); }
// lanes (a0 b0 a1 b1) and (a2 b2 a3 b3) of each piece
template <int H, int... I>
FANIN_INLINE vf zip1(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + 2 * H + I % 4 / 2 + (I % 2) * kLanes)...);
}
// lanes (a0 a1 b0 b1) and (a2 a3 b2 b3) of each piece
template <int H, int... I>
FANIN_INLINE vf zip2(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + 2 * H + I % 2 + (I % 4 / 2) * kLanes)...);
}
template <int M>
using seq = std::make_integer_sequence<int, M>;
template <int Later, int... I>
FANIN_INLINE vf every_second(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + (2 * I < kLanes ? 0 : Later))...);
}
}  // namespace detail

// Lanes 0, 2, 4 ... of a and b end to end; Later: where b begins one element before a ends.
template <int Later>
FANIN_INLINE vf every_second(vf a, vf b) { return detail::every_second<Later>(a, b, detail::seq<kLanes>{}); }

FANIN_INLINE vf repeat(vp p) {
#if FANIN_VEC_BYTES == 64 && defined(__AVX512F__)             // the compiler goes through memory, and waits for it
  return (vf)_mm512_broadcast_f32x4((__m128)p);
#else
  return detail::repeat(p, detail::seq<kLanes>{});
#endif
}

#if FANIN_VEC_BYTES >= 16
template <class T>
FANIN_INLINE vf repeat4(const T* p) { return repeat(widen<4>(p)); }
#if FANIN_VEC_BYTES == 32 && defined(__AVX__)
FANIN_INLINE vf repeat4(const float* p) {                     // one instruction; the compiler finds two
  return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
#endif
#endif

template <int B>
FANIN_INLINE vp piece(vf v) {
#if FANIN_VEC_BYTES == 32 && defined(__AVX__)                 // the compiler permutes the whole vector first
  return (vp)_mm256_extractf128_ps((__m256)v, B);
#elif FANIN_VEC_BYTES == 64 && defined(__AVX512F__)
  return (vp)_mm512_extractf32x4_ps((__m512)v, B);
#else
  return detail::piece<B>(v, detail::seq<kPiece>{});
#endif
}

// piece b of the result comes from get(b)
template <int M, class Get>
FANIN_INLINE Vec<float, M> gather_pieces(int first, const Get& get) {
  if constexpr (M == kPiece) return get(first);
  else
    return detail::concat<M / 2>(gather_pieces<M / 2>(first, get), gather_pieces<M / 2>(first + M / 2 / kPiece, get),
                                 detail::seq<M>{});
}

// The same vector, of which the compiler no longer knows where it came from.
FANIN_INLINE vf opaque(vf v) {
#if FANIN_VEC_BYTES >= 16 && (defined(__AVX512F__) || (defined(__AVX__) && FANIN_VEC_BYTES <= 32))
  asm("" : "+x"(v));
#endif
  return v;
}

// sum + a * b, rounded once where the CPU can. Left to the compiler, whether that is one instruction depends on the loop around it,
// and so do the bits.
FANIN_INLINE vf add_product(vf sum, vf a, vf b) {
#if FANIN_VEC_BYTES == 64 && defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif FANIN_VEC_BYTES == 32 && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

// In the order of the lanes.
FANIN_INLINE float sum_of(vf v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Four consecutive weights, each to be multiplied with a whole vector. One load and four in-register shuffles instead of
// four broadcast loads: the load ports are what limits the kernels, the shuffle ports are idle.
struct Weights4 {
#if FANIN_VEC_BYTES >= 16
  vf v;
  template <class T>
  FANIN_INLINE explicit Weights4(const T* p) : v(opaque(repeat4(p))) {}         // or pick() would be turned back into four loads
  template <int J>
  FANIN_INLINE vf pick() const { return detail::pick<J>(v, detail::seq<kLanes>{}); }
#else
  float v[4];
  template <class T>
  FANIN_INLINE explicit Weights4(const T* p) {
    for (int j = 0; j < 4; ++j) v[j] = widen1(p + j);
  }
  template <int J>
  FANIN_INLINE vf pick() const { return splat(v[J]); }
#endif
};

// A number that is loaded here, not where it is used. Vector loads are picked by age: one that waits for an address just asked
// for lets the load ports run dry (0.7 cycles an FMA instead of 0.5), so addresses are loaded while vectors of others are.
template <class T>
FANIN_INLINE uint64_t early(const void* p) {
  uint64_t number = load_raw<T>(p);
  asm volatile("" : "+r"(number));
  return number;
}

// In-place transpose of each kPiece x kPiece block: lane i of piece b of r[j] <-> lane j of piece b of r[i].
FANIN_INLINE void transpose_pieces(vf (&r)[kPiece]) {
  if constexpr (kPiece == 4) {
    using S = detail::seq<kLanes>;
    const vf a = detail::zip1<0>(r[0], r[1], S{}), b = detail::zip1<1>(r[0], r[1], S{});
    const vf c = detail::zip1<0>(r[2], r[3], S{}), d = detail::zip1<1>(r[2], r[3], S{});
    r[0] = detail::zip2<0>(a, c, S{});
    r[1] = detail::zip2<1>(a, c, S{});
    r[2] = detail::zip2<0>(b, d, S{});
    r[3] = detail::zip2<1>(b, d, S{});
  }
}

}  // namespace bytesN
}  // namespace fanin
