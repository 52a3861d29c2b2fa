// Vectors of the compute type, as wide as the instruction set's registers, and how rows of each dtype get in and out.
//
// This file is compiled once per instruction set (OMNINORM_SET names it), each time in a namespace of its own. No
// standard header with functions may be included: the linker would keep one set's copy of them for all.
// Lengths count elements. N is the number of lanes, C the compute type: float, or double for double rows.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace omninorm::OMNINORM_SET {

#if defined(OMNINORM_VECTOR_BYTES)
constexpr int BYTES = OMNINORM_VECTOR_BYTES;
#elif defined(__AVX512F__)
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

template <class T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<BFloat16> = true;

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = Floats;
};
template <>
struct VectorOf<double> {
  using Type = Doubles;
};
template <class C>
using Vector = typename VectorOf<C>::Type;
template <class C>
constexpr int LANES = BYTES / sizeof(C);

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

// a · b + c with one rounding, where the set has it.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// Dtypes: N elements from and to memory of any alignment, rounded to nearest even --------------------------------

// The compilers' own conversions between lanes of 16 and 32 bits are several times slower here.
INLINE Words to_words(Halfwords v) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}
// Of words below 2^16.
INLINE Halfwords to_halfwords(Words v) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Halfwords)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Halfwords)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, Halfwords);
#endif
}

INLINE Floats widen(BFloat16, Halfwords bits) { return (Floats)(to_words(bits) << 16); }

// A NaN must have 0 in its lower bits, else rounding could carry it into the sign. Those that arithmetic makes have,
// and those of bfloat16 rows; gains are `settled` before.
INLINE Words nearest_bfloat16(Floats v) {
  const Words bits = (Words)v;
  return (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
}
INLINE Halfwords narrow(BFloat16, Floats v) { return to_halfwords(nearest_bfloat16(v) >> 16); }
INLINE Floats settled(Floats v) { return (v == v) ? v : v * 0 + __builtin_nanf(""); }

INLINE Floats widen(Float16, Halfwords bits) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)bits);
#else
  const Words wide = to_words(bits);
  const Words magnitude = (wide & 0x7fff) << 13;
  const Floats finite = (Floats)magnitude * 0x1p112f;  // the exponents' bias; subnormals come out right too
  const Words value = (magnitude >= (0x7c00u << 13)) ? magnitude | 0x7f800000u : (Words)finite;
  return (Floats)(value | ((wide & 0x8000) << 16));
#endif
}

INLINE Halfwords narrow(Float16, Floats v) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Halfwords)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && !defined(OMNINORM_VECTOR_BYTES)
  return (Halfwords)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (Halfwords)vcvt_f16_f32(v);
#else
  const Words bits = (Words)v;
  const Words magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // ½ has the spacing of the subnormals: adding it rounds to that.
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

INLINE Floats load(const float* x) { return read<Floats>(x); }
INLINE Doubles load(const double* x) { return read<Doubles>(x); }
template <class T>
INLINE Floats load(const T* x) {
  return widen(T{}, read<Halfwords>(x));
}

INLINE void store(float* y, Floats v) { write(y, v); }
INLINE void store(double* y, Doubles v) { write(y, v); }
template <class T>
INLINE void store(T* y, Floats v) {
  write(y, narrow(T{}, v));
}

// v as T holds it.
template <class T, class V>
INLINE V rounded(V v) {
  if constexpr (IS_BFLOAT16<T>) {
    return (V)nearest_bfloat16(v);
  } else if constexpr (sizeof(T) == 2) {
    return widen(T{}, narrow(T{}, v));
  } else {
    return v;
  }
}

// A vector's worth of a row: whole, or what is left at its end.
struct Whole {
  template <class T>
  INLINE auto load(const T* x) const {
    return OMNINORM_SET::load(x);
  }
  template <class T, class V>
  INLINE void store(T* y, V v) const {
    OMNINORM_SET::store(y, v);
  }
  template <class V>
  INLINE V only(V v) const {
    return v;
  }
};

struct Part {
  int count;

  template <class T>
  INLINE auto load(const T* x) const {
    T padded[LANES<Compute<T>>] = {};
    for (int lane = 0; lane < count; ++lane) padded[lane] = x[lane];
    return OMNINORM_SET::load(padded);
  }
  template <class T, class V>
  INLINE void store(T* y, V v) const {
    T padded[LANES<Compute<T>>];
    OMNINORM_SET::store(padded, v);
    for (int lane = 0; lane < count; ++lane) y[lane] = padded[lane];
  }
  // v with 0 in the lanes beyond the row's end.
  template <class V>
  INLINE V only(V v) const {
    for (int lane = count; lane < int(sizeof(V) / sizeof(v[0])); ++lane) v[lane] = 0;
    return v;
  }
};

// do_vector(Whole or Part, index of its first element) over a row of T, after ahead(index) once per cache line. While
// a row is written, memory would otherwise wait: `ahead` asks for the next one.
template <class T, class Ahead, class Do>
INLINE void each_vector(int64_t width, Ahead ahead, Do do_vector) {
  constexpr int N = LANES<Compute<T>>;
  constexpr int LINE = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + LINE <= width; i += LINE) {
    ahead(i);
#pragma GCC unroll 16
    for (int u = 0; u < LINE; u += N) do_vector(Whole{}, i + u);
  }
  for (; i + N <= width; i += N) do_vector(Whole{}, i);
  if (i < width) do_vector(Part{int(width - i)}, i);
}
template <class T, class Do>
INLINE void each_vector(int64_t width, Do do_vector) {
  each_vector<T>(width, [](int64_t) {}, do_vector);
}

// Into the first level of cache, or no nearer than the second. An address beyond the tensor does no harm.
INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
INLINE void prefetch_far(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace omninorm::OMNINORM_SET
