// Sums along a row, in an order that depends on the row's width alone.
//
// Elements gather in lanes of the compute type for a few steps and then move to a wider total: double for float,
// a pair of doubles for double. So the error is that of a few additions, however wide the row is.
#pragma once
#include "vector.h"

namespace omninorm::OMNINORM_SET {

// A number as the sum of two, the second beyond the first's last place.
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

// The two halves of a vector of floats.
struct Halves {
  HalfOfFloats low, high;
};
INLINE Halves halves(Floats v) {
  Halves both;
  __builtin_memcpy(&both, &v, sizeof v);
  return both;
}
INLINE Doubles to_doubles(HalfOfFloats v) {
#if defined(__AVX512F__) && !defined(OMNINORM_VECTOR_BYTES)
  return _mm512_cvtps_pd(v);
#elif defined(__AVX2__) && !defined(OMNINORM_VECTOR_BYTES)
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

// sums[0 …] += v, in double.
INLINE void add_to(Whole, double* sums, Floats v) {
  store(sums, load(sums) + to_doubles(halves(v).low));
  store(sums + LANES<double>, load(sums + LANES<double>) + to_doubles(halves(v).high));
}
INLINE void add_to(Whole, double* sums, Doubles v) { store(sums, load(sums) + v); }
template <class V>
INLINE void add_to(Part part, double* sums, V v) {
  for (int lane = 0; lane < part.count; ++lane) sums[lane] += v[lane];
}

constexpr int UNROLL = 4;
// Steps until the lanes move to the total. Eight additions err by four last places at the worst.
constexpr int STEPS = 8;

// K sums over a row at once: add(Whole or Part, index, lanes) adds a vector's terms to each of the K lanes.
template <class C, int K, class Add>
INLINE void row_sums(int64_t width, Pair (&sums)[K], Add add) {
  constexpr int64_t BLOCK = UNROLL * LANES<C>;
  Total<C> totals[K];
  int64_t i = 0;
  const int64_t whole = width - width % BLOCK;
  while (i < whole) {
    Vector<C> lanes[UNROLL][K] = {};
    const int64_t stop = (whole - i > STEPS * BLOCK) ? i + STEPS * BLOCK : whole;
    for (; i < stop; i += BLOCK) {
#pragma GCC unroll 4
      for (int u = 0; u < UNROLL; ++u) add(Whole{}, i + u * LANES<C>, lanes[u]);
    }
    for (int k = 0; k < K; ++k) totals[k].add((lanes[0][k] + lanes[1][k]) + (lanes[2][k] + lanes[3][k]));
  }
  Vector<C> lanes[K] = {};
  for (; i + LANES<C> <= width; i += LANES<C>) add(Whole{}, i, lanes);
  if (i < width) add(Part{int(width - i)}, i, lanes);
  for (int k = 0; k < K; ++k) {
    totals[k].add(lanes[k]);
    sums[k] = totals[k].value();
  }
}

// The sum of term(Whole or Part, index) with every element added to the wider total, so that a constant row's is exact.
template <class C, class Term>
INLINE Pair row_total(int64_t width, Term term) {
  constexpr int64_t BLOCK = UNROLL * LANES<C>;
  Total<C> totals[UNROLL];
  int64_t i = 0;
  for (; i + BLOCK <= width; i += BLOCK) {
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) totals[u].add(term(Whole{}, i + u * LANES<C>));
  }
  for (; i + LANES<C> <= width; i += LANES<C>) totals[0].add(term(Whole{}, i));
  if (i < width) totals[0].add(term(Part{int(width - i)}, i));
  for (int u = 1; u < UNROLL; ++u) totals[0].add(totals[u]);
  return totals[0].value();
}

}  // namespace omninorm::OMNINORM_SET
