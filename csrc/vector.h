// Vectors of the compute type, as wide as the instruction set's registers, and their loads and stores for each dtype.
//
// This file is compiled once per instruction set, in the namespace OMNINORM_SET. It must not include standard headers
// with inline functions, because the linker would keep the copy of one set for all sets. Lengths are numbers of
// elements. N is the number of lanes, C the compute type: float, or double for double rows.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Follows the parameters of a lambda, so that it is inlined and its captures stay in registers.
#define INLINED __attribute__((always_inline))

namespace omninorm::OMNINORM_SET {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halfwords __attribute__((vector_size(BYTES / 2)));
typedef float HalfOfFloats __attribute__((vector_size(BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which statistics and products of rows of T are computed.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

// A register of bfloat16, split into its elements with even and odd indices. These are the lower and upper halves of
// 32-bit words, so one operation each converts them to float; restoring their order would take several.
struct EvenOdd {
  Floats even, odd;
};
INLINE EvenOdd operator+(EvenOdd a, EvenOdd b) { return {a.even + b.even, a.odd + b.odd}; }
INLINE EvenOdd operator-(EvenOdd a, EvenOdd b) { return {a.even - b.even, a.odd - b.odd}; }
INLINE EvenOdd operator*(EvenOdd a, EvenOdd b) { return {a.even * b.even, a.odd * b.odd}; }
INLINE EvenOdd operator-(EvenOdd a) { return {-a.even, -a.odd}; }
INLINE EvenOdd& operator+=(EvenOdd& a, EvenOdd b) { return a = a + b; }

template <class T>
struct VectorOf {
  using Type = Floats;
};
template <>
struct VectorOf<double> {
  using Type = Doubles;
};
template <>
struct VectorOf<BFloat16> {
  using Type = EvenOdd;
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int LANES = sizeof(Vector<T>) / sizeof(Compute<T>);

template <class A, class B>
constexpr bool IS_SAME = false;
template <class A>
constexpr bool IS_SAME<A, A> = true;

template <class V>
INLINE V broadcast(double c) {
  return V{} + c;
}
template <>
INLINE Floats broadcast<Floats>(double c) {
  return Floats{} + float(c);
}
template <>
INLINE EvenOdd broadcast<EvenOdd>(double c) {
  return {Floats{} + float(c), Floats{} + float(c)};
}

// Returns a · b + c, with one rounding if the set supports it.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

INLINE EvenOdd fma(EvenOdd a, EvenOdd b, EvenOdd c) { return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)}; }

// Dtypes: loads and stores of N elements at any alignment, rounded to nearest even --------------------------------

// The compilers' own conversions between lanes of 16 and 32 bits would be several times slower.
INLINE Words to_words(Halfwords v) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}
// For words below 2^16.
INLINE Halfwords to_halfwords(Words v) {
#if defined(__AVX512F__)
  return (Halfwords)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (Halfwords)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, Halfwords);
#endif
}

// The lower bits of a NaN must be 0, otherwise rounding could carry into the sign. They are for NaNs that arithmetic
// produces and for bfloat16 rows; prepare_gain clears them in gains.
INLINE Words to_upper_half(Floats v) {
  const Words bits = (Words)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}
INLINE EvenOdd widen(Words pairs) { return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000)}; }
INLINE Words narrow(EvenOdd v) {
#if defined(__AVX512BW__)
  // The upper halves of all words, in order, plus one if the lower half is above ½, or is ½ and the upper half is odd.
  const Words from = {0x210001, 0x230003, 0x250005, 0x270007, 0x290009, 0x2b000b, 0x2d000d, 0x2f000f,
                      0x310011, 0x330013, 0x350015, 0x370017, 0x390019, 0x3b001b, 0x3d001d, 0x3f001f};
  const __m512i upper = _mm512_permutex2var_epi16((__m512i)v.even, (__m512i)from, (__m512i)v.odd);
  const __m512i lower = _mm512_permutex2var_epi16((__m512i)v.even, (__m512i)(from - 0x10001), (__m512i)v.odd);
  const __m512i half = _mm512_set1_epi16(int16_t(0x8000)), one = _mm512_set1_epi16(1);
  constexpr int HALF_OR_EVEN_ONE = 0xce;  // half | (~upper & one): the least lower half that is rounded up, less 0 or 1
  const __m512i least = _mm512_ternarylogic_epi32(upper, half, one, HALF_OR_EVEN_ONE);
  return (Words)_mm512_mask_add_epi16(upper, _mm512_cmpge_epu16_mask(lower, least), upper, one);
#else
  return (to_upper_half(v.even) >> 16) | (to_upper_half(v.odd) & 0xffff0000);
#endif
}

INLINE Floats widen(Float16, Halfwords bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)bits);
#else
  const Words wide = to_words(bits);
  const Words magnitude = (wide & 0x7fff) << 13;
  const Floats finite = (Floats)magnitude * 0x1p112f;  // the exponents' bias; this is also right for subnormal numbers
  const Words value = (magnitude >= (0x7c00u << 13)) ? magnitude | 0x7f800000u : (Words)finite;
  return (Floats)(value | ((wide & 0x8000) << 16));
#endif
}

INLINE Halfwords narrow(Float16, Floats v) {
#if defined(__AVX512F__)
  return (Halfwords)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Halfwords)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (Halfwords)vcvt_f16_f32(v);
#else
  const Words bits = (Words)v;
  const Words magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // The spacing of float32 at ½ is that of float16's subnormal numbers, so adding ½ rounds to it.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words value = (magnitude < (113u << 23)) ? subnormal : normal;
  value = (magnitude >= 0x477ff000u) ? value * 0 + 0x7c00u : value;  // 65520 and above
  value = (v == v) ? value : value * 0 + 0x7e00u;
  return to_halfwords(value | ((bits >> 16) & 0x8000));
#endif
}

template <class V, class T>
INLINE V read(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
INLINE void write(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}
// Read as one object, it would go through memory.
template <>
INLINE EvenOdd read<EvenOdd>(const float* from) {
  return {read<Floats>(from), read<Floats>(from + LANES<float>)};
}
INLINE void write(float* to, EvenOdd v) {
  write(to, v.even);
  write(to + LANES<float>, v.odd);
}

// Loads one element.
INLINE double element(const double* x) { return *x; }
INLINE float element(const float* x) { return *x; }
INLINE float element(const BFloat16* x) {
  const uint32_t word = uint32_t(x->bits) << 16;
  return read<float>(&word);
}
INLINE float element(const Float16* x) { return widen(Float16{}, Halfwords{} + x->bits)[0]; }

INLINE Floats load(const float* x) { return read<Floats>(x); }
INLINE Doubles load(const double* x) { return read<Doubles>(x); }
INLINE Floats load(const Float16* x) { return widen(Float16{}, read<Halfwords>(x)); }
INLINE EvenOdd load(const BFloat16* x) { return widen(read<Words>(x)); }

INLINE void store(float* y, Floats v) { write(y, v); }
INLINE void store(double* y, Doubles v) { write(y, v); }
INLINE void store(Float16* y, Floats v) { write(y, narrow(Float16{}, v)); }
INLINE void store(BFloat16* y, EvenOdd v) { write(y, narrow(v)); }

// Returns v, rounded to T.
template <class T>
INLINE Vector<T> rounded(Vector<T> v) {
  return v;
}
template <>
INLINE Floats rounded<Float16>(Floats v) {
  return widen(Float16{}, narrow(Float16{}, v));
}
template <>
INLINE EvenOdd rounded<BFloat16>(EvenOdd v) {
  return {(Floats)(to_upper_half(v.even) & 0xffff0000), (Floats)(to_upper_half(v.odd) & 0xffff0000)};
}

// Conversions between numbers in the order of memory and in the order of V.
template <class V, class C>
INLINE V arranged(const C* values) {
  if constexpr (sizeof(V) == BYTES) {
    return read<V>(values);
  } else {
    float even[LANES<float>], odd[LANES<float>];
    for (int lane = 0; lane < LANES<float>; ++lane) {
      even[lane] = values[2 * lane];
      odd[lane] = values[2 * lane + 1];
    }
    return {load(even), load(odd)};
  }
}
template <class C, class V>
INLINE void in_order(C* values, V v) {
  if constexpr (sizeof(V) == BYTES) {
    write(values, v);
  } else {
    float even[LANES<float>], odd[LANES<float>];
    store(even, v.even);
    store(odd, v.odd);
    for (int lane = 0; lane < LANES<float>; ++lane) {
      values[2 * lane] = even[lane];
      values[2 * lane + 1] = odd[lane];
    }
  }
}

// Streaming (non-temporal) stores; the addresses must be multiples of the vector's size.
#if defined(__AVX512F__)
INLINE void stream(float* y, Floats v) { _mm512_stream_ps(y, v); }
INLINE void stream(double* y, Doubles v) { _mm512_stream_pd(y, v); }
INLINE void stream(BFloat16* y, EvenOdd v) { _mm512_stream_si512((__m512i*)y, (__m512i)narrow(v)); }
INLINE void stream(Float16* y, Floats v) { _mm256_stream_si256((__m256i*)y, (__m256i)narrow(Float16{}, v)); }
#elif defined(__AVX2__)
INLINE void stream(float* y, Floats v) { _mm256_stream_ps(y, v); }
INLINE void stream(double* y, Doubles v) { _mm256_stream_pd(y, v); }
INLINE void stream(BFloat16* y, EvenOdd v) { _mm256_stream_si256((__m256i*)y, (__m256i)narrow(v)); }
INLINE void stream(Float16* y, Floats v) { _mm_stream_si128((__m128i*)y, (__m128i)narrow(Float16{}, v)); }
#elif defined(__SSE2__)
INLINE void stream(float* y, Floats v) { _mm_stream_ps(y, v); }
INLINE void stream(double* y, Doubles v) { _mm_stream_pd(y, v); }
INLINE void stream(BFloat16* y, EvenOdd v) { _mm_stream_si128((__m128i*)y, (__m128i)narrow(v)); }
INLINE void stream(Float16* y, Floats v) { store(y, v); }
#else
template <class T>
INLINE void stream(T* y, Vector<T> v) {
  store(y, v);
}
#endif
// Returns whether streaming stores may write a row at y.
INLINE bool is_aligned(const void* y) { return reinterpret_cast<uintptr_t>(y) % BYTES == 0; }
// After this call, streamed rows are visible to other threads.
INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Memory in which each vector is in one cache line; 64 bytes that cross into another line take twice as long.
template <class C>
struct Scratch {
  char* const memory;
  C* const values;
  explicit Scratch(int64_t count)
      : memory(new char[count * sizeof(C) + 64]),
        values(reinterpret_cast<C*>(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64))) {}
  ~Scratch() { delete[] memory; }
  Scratch(const Scratch&) = delete;
};

// A vector of a row: a whole one, or the remainder at the row's end.
struct Whole {
  template <class T>
  INLINE Vector<T> load(const T* x) const {
    return OMNINORM_SET::load(x);
  }
  template <class T>
  INLINE void store(T* y, Vector<T> v) const {
    OMNINORM_SET::store(y, v);
  }
  template <class T>
  INLINE void store(T* y, Vector<T> v, bool past_caches) const {
    past_caches ? OMNINORM_SET::stream(y, v) : OMNINORM_SET::store(y, v);
  }
  template <class T>
  INLINE Vector<T> only(Vector<T> v) const {
    return v;
  }
};

struct Part {
  int count;

  template <class T>
  INLINE Vector<T> load(const T* x) const {
    T padded[LANES<T>] = {};
    for (int lane = 0; lane < count; ++lane) padded[lane] = x[lane];
    return OMNINORM_SET::load(padded);
  }
  template <class T>
  INLINE void store(T* y, Vector<T> v) const {
    T padded[LANES<T>];
    OMNINORM_SET::store(padded, v);
    for (int lane = 0; lane < count; ++lane) y[lane] = padded[lane];
  }
  template <class T>
  INLINE void store(T* y, Vector<T> v, bool) const {
    store(y, v);
  }
  // Returns v with 0 in the lanes beyond the row's end.
  template <class T>
  INLINE Vector<T> only(Vector<T> v) const {
    Compute<T> values[LANES<T>];
    in_order(values, v);
    for (int lane = count; lane < LANES<T>; ++lane) values[lane] = 0;
    return arranged<Vector<T>>(values);
  }
};

// Loads a gain or bias at index i of a row of T. For 16-bit rows it has been `arranged` and padded to whole vectors.
template <class T, class At>
INLINE Vector<T> load_gain(At at, const Compute<T>* gain, int64_t i) {
  if constexpr (sizeof(T) == 2) {
    return read<Vector<T>>(gain + i);
  } else {
    return at.load(gain + i);
  }
}

// Calls do_vector(Whole or Part, index of its first element) for each vector of a row of T.
template <class T, class Do>
INLINE void each_vector(int64_t width, Do do_vector) {
  constexpr int N = LANES<T>;
  int64_t i = 0;
  for (; i + 4 * N <= width; i += 4 * N) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) do_vector(Whole{}, i + u * N);
  }
  for (; i + N <= width; i += N) do_vector(Whole{}, i);
  if (i < width) do_vector(Part{int(width - i)}, i);
}

// Prefetches a cache line into the second-level cache. The address may be beyond the tensor. This is a macro because
// GCC would remove a function without effects.
#define FETCH(address) __builtin_prefetch(address, 0, 2)
// Prefetch distance in elements: 2 to 8 KiB are equally fast, 1 KiB is too late.
template <class T>
constexpr int64_t AHEAD = 4096 / sizeof(T);

}  // namespace omninorm::OMNINORM_SET
