// Sums along a row, in an order that depends only on the row's width.
//
// Elements are added in lanes of the compute type for a few steps, and then the lanes are added to a wider total:
// double for float, a pair of doubles for double. So the error is that of a few additions for rows of any width.
#pragma once
#include "vector.h"

namespace omninorm::OMNINORM_SET {

// A number as the sum of two parts; the second is smaller than the last place of the first.
struct Pair {
  double high, low;
};

template <class V>
INLINE V two_sum(V a, V b, V& error) {
  const V sum = a + b;
  const V from_b = sum - a;
  error = (a - (sum - from_b)) + (b - from_b);
  return sum;
}

INLINE Pair plus(Pair total, double value) {
  double error;
  const double sum = two_sum(total.high, value, error);
  return {sum, total.low + error};
}

INLINE Pair divided(Pair sum, int64_t count) {
  const double first = sum.high / double(count);
  const double rest = __builtin_fma(-first, double(count), sum.high);
  return plus({first, 0}, (rest + sum.low) / double(count));
}

// Returns the two halves of a vector of floats.
struct Halves {
  HalfOfFloats low, high;
};
INLINE Halves halves(Floats v) {
  Halves both;
  __builtin_memcpy(&both, &v, sizeof v);
  return both;
}
INLINE Doubles to_doubles(HalfOfFloats v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(v);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, Doubles);
#endif
}

template <class C>
struct Total;

template <>
struct Total<float> {
  Doubles low{}, high{};

  INLINE void add(Floats v) {
    low += to_doubles(halves(v).low);
    high += to_doubles(halves(v).high);
  }
  INLINE void add(const Total& other) {
    low += other.low;
    high += other.high;
  }
  INLINE Pair value() const {
    const Doubles lanes = low + high;
    double sum = 0;
    for (int lane = 0; lane < LANES<double>; ++lane) sum += lanes[lane];
    return {sum, 0};
  }
};

template <>
struct Total<double> {
  Doubles sum{}, rest{};

  INLINE void add(Doubles v) {
    Doubles error;
    sum = two_sum(sum, v, error);
    rest += error;
  }
  INLINE void add(const Total& other) {
    add(other.sum);
    rest += other.rest;
  }
  INLINE Pair value() const {
    Pair total{0, 0};
    for (int lane = 0; lane < LANES<double>; ++lane) total = plus(total, sum[lane]);
    for (int lane = 0; lane < LANES<double>; ++lane) total.low += rest[lane];
    return plus({total.high, 0}, total.low);
  }
};

INLINE void add_to(Total<float>& total, Floats v) { total.add(v); }
INLINE void add_to(Total<float>& total, EvenOdd v) { total.add(v.even + v.odd); }
INLINE void add_to(Total<double>& total, Doubles v) { total.add(v); }

// Several registers are used in turn, because an addition must wait for the previous one into the same register: four,
// or fewer if a sum needs two registers or if three sums are computed together.
template <class T, int K>
constexpr int UNROLL = 4 / (sizeof(Vector<T>) > BYTES ? 2 : 1) / (K > 1 ? 2 : 1);
// The number of steps until the lanes are added to the total. Eight additions err by at most four last places.
constexpr int STEPS = 8;

// Computes K sums over a row together: add(Whole or Part, index, lanes) adds a vector's terms to each of the K lanes.
template <class T, int K, class Add>
INLINE void row_sums(int64_t width, Pair (&sums)[K], Add add) {
  using V = Vector<T>;
  constexpr int64_t N = LANES<T>;
  constexpr int TURNS = UNROLL<T, K>;
  constexpr int64_t BLOCK = TURNS * N;
  Total<Compute<T>> totals[K];
  int64_t i = 0;
  const int64_t whole = width - width % BLOCK;
  while (i < whole) {
    V lanes[TURNS][K] = {};
    const int64_t stop = (whole - i > STEPS * BLOCK) ? i + STEPS * BLOCK : whole;
    for (; i < stop; i += BLOCK) {
#pragma GCC unroll 4
      for (int u = 0; u < TURNS; ++u) add(Whole{}, i + u * N, lanes[u]);
    }
    for (int k = 0; k < K; ++k) {
      V sum = lanes[0][k];
      if constexpr (TURNS > 1) sum = sum + lanes[1][k];
      if constexpr (TURNS > 2) sum = sum + (lanes[2][k] + lanes[3][k]);
      add_to(totals[k], sum);
    }
  }
  V lanes[K] = {};
  for (; i + N <= width; i += N) add(Whole{}, i, lanes);
  if (i < width) add(Part{int(width - i)}, i, lanes);
  for (int k = 0; k < K; ++k) {
    add_to(totals[k], lanes[k]);
    sums[k] = totals[k].value();
  }
}

// Computes the sum of term(Whole or Part, index). It is exact for a constant row: floats are added to the wider total
// one by one, and eight elements of 16-bit dtypes have an exact sum.
template <class T, class Term>
INLINE Pair row_total(int64_t width, Term term) {
  using V = Vector<T>;
  if constexpr (sizeof(T) == 2) {
    Pair sum[1];
    row_sums<T, 1>(width, sum, [&](auto at, int64_t i, V* lanes) { lanes[0] += term(at, i); });
    return sum[0];
  } else {
    constexpr int64_t N = LANES<T>;
    Total<Compute<T>> totals[4];
    int64_t i = 0;
    for (; i + 4 * N <= width; i += 4 * N) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) totals[u].add(term(Whole{}, i + u * N));
    }
    for (; i + N <= width; i += N) totals[0].add(term(Whole{}, i));
    if (i < width) totals[0].add(term(Part{int(width - i)}, i));
    for (int u = 1; u < 4; ++u) totals[0].add(totals[u]);
    return totals[0].value();
  }
}

// Sums over rows for the gradient of a gain: in the compute type for a few rows, and then in double.
template <class T>
struct ColumnSums {
  using C = Compute<T>;
  using V = Vector<T>;
  double* const sums;   // or null, if the gradient is not needed
  const int64_t width;
  const int64_t padded;
  Scratch<C> memory;
  C* const few;         // in V's order of elements, padded to whole vectors
  int rows = 0;

  ColumnSums(double* sums, int64_t width)
      : sums(sums), width(width), padded(sums ? width + LANES<T> : 0), memory(padded),
        few(sums ? memory.values : nullptr) {
    clear();
  }
  ~ColumnSums() { flush(); }

  void row_done() {
    if (++rows == STEPS) flush();
  }

  void clear() {
    rows = 0;
    __builtin_memset(memory.values, 0, padded * sizeof(C));
  }
  __attribute__((noinline)) void flush() {
    if (!few || rows == 0) return;
    for (int64_t i = 0; i < width; i += LANES<T>) {
      C values[LANES<T>];
      in_order(values, read<V>(few + i));
      const int64_t count = width - i < LANES<T> ? width - i : LANES<T>;
      for (int64_t lane = 0; lane < count; ++lane) sums[i + lane] += values[lane];
    }
    clear();
  }
};

}  // namespace omninorm::OMNINORM_SET
