// Slow path for extreme rows: r = 1/√(mean square + ε) is outside ORDINARY's bounds, or not finite.
//
// Such a row is rescaled by a power of two, the next above its largest magnitude (or √ε). No square then overflows or
// underflows, and RMSNorm's x̂ has the same bits as without rescaling. The rest is computed in double, one element at a
// time, because these rows are rare.
#pragma once
#include "sums.h"

namespace omninorm::OMNINORM_SET {

// Within these bounds, squares neither overflow nor underflow in the compute type.
template <class C>
INLINE bool ordinary(C r);
template <>
INLINE bool ordinary(float r) {
  return r >= 0x1p-60f && r <= 0x1p50f;
}
template <>
INLINE bool ordinary(double r) {
  return r >= 0x1p-400 && r <= 0x1p400;
}

INLINE double first(Floats v) { return v[0]; }
INLINE double first(Doubles v) { return v[0]; }
INLINE double first(EvenOdd v) { return v.even[0]; }

template <class T>
INLINE void put(T* y, double value) {
  Part{1}.store(y, broadcast<Vector<T>>(value));
}
// Returns `value`, rounded to T.
template <class T>
INLINE double rounded_value(double value) {
  return first(rounded<T>(broadcast<Vector<T>>(value)));
}
// Returns the gain at index i; see load_gain.
template <class T>
INLINE double gain_at(const Compute<T>* gain, int64_t i) {
  if constexpr (sizeof(Vector<T>) > BYTES) {
    constexpr int64_t N = LANES<T>;
    return gain[i / N * N + (i % 2) * (N / 2) + i % N / 2];
  } else {
    return gain[i];
  }
}

constexpr double LARGEST = 0x1.fffffffffffffp1023;
constexpr double SMALLEST = 0x1p-1022;

// Returns NaN if the row has one.
INLINE double largest_magnitude(const double* row, int64_t width) {
  double largest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double magnitude = __builtin_fabs(row[i]);
    if (!(magnitude <= largest)) largest = magnitude;
    if (largest != largest) return largest;
  }
  return largest;
}

// Returns the power of two that scales the larger of `magnitude` and √ε into [½, 1).
INLINE double reciprocal_unit(double magnitude, double eps) {
  const double least = eps > 0 ? __builtin_sqrt(eps) : 0;
  if (magnitude < least) magnitude = least;
  if (magnitude < SMALLEST) magnitude = SMALLEST;
  if (magnitude > LARGEST / 8) magnitude = LARGEST / 8;  // so that the reciprocal is not subnormal
  int exponent;
  __builtin_frexp(magnitude, &exponent);
  return __builtin_ldexp(1, -exponent);
}

// r = root · per_unit, stored as two factors because their product may be out of double's range; and LayerNorm's mean.
struct Scale {
  double root, per_unit, mean;
  INLINE double operator()(double v) const { return v * root * per_unit; }
};

// Returns the mean of `row` in two parts; the elements must be so small that their sum is finite.
INLINE Pair row_mean(const double* row, int64_t width) {
  const Pair sum = row_total<double>(width, [&](auto at, int64_t i) { return at.load(row + i); });
  return divided(sum, width);
}

// Subtracts the mean from the row, multiplied by `headroom` if the difference of two elements would overflow. Returns
// `headroom` and the mean.
struct Centered {
  double headroom, mean;
};
INLINE Centered center(double* row, int64_t width, double largest) {
  const double headroom = largest > LARGEST / 8 ? 0.125 : 1;
  const double per_unit = reciprocal_unit(largest, 0);
  for (int64_t i = 0; i < width; ++i) row[i] *= per_unit;
  const Pair mean = row_mean(row, width);
  for (int64_t i = 0; i < width; ++i) row[i] = ((row[i] - mean.high) - mean.low) * (headroom / per_unit);
  return {headroom, mean.high / per_unit};
}

// Returns r for an infinite or NaN largest magnitude: 1/√∞ = 0, but differences from an infinite mean are NaN.
INLINE Scale not_finite(double* row, int64_t width, bool defined) {
  const double r = defined ? 0 : __builtin_nan("");
  for (int64_t i = 0; i < width; ++i) row[i] *= r;
  return {r, 1, __builtin_nan("")};
}

// Writes x̂ in place of x, and returns the multiplication by r with which the backward pass ends.
template <class C>
Scale rms_standardize(double* row, int64_t width, double eps) {
  const double largest = largest_magnitude(row, width);
  if (!(largest <= LARGEST)) return not_finite(row, width, largest == largest);
  const double per_unit = reciprocal_unit(largest, eps);
  Scratch<C> scaled(width);
  for (int64_t i = 0; i < width; ++i) scaled.values[i] = C(row[i] * per_unit);
  Pair square[1];
  row_sums<C, 1>(width, square, [&](auto at, int64_t i, Vector<C>* lanes) {
    const Vector<C> v = at.load(scaled.values + i);
    lanes[0] = fma(v, v, lanes[0]);
  });
  const C root = C(1 / __builtin_sqrt(square[0].high / double(width) + eps * per_unit * per_unit));
  for (int64_t i = 0; i < width; ++i) row[i] = scaled.values[i] * root;
  return {root, per_unit, 0};
}

inline Scale layer_standardize(double* row, int64_t width, double eps) {
  const double largest = largest_magnitude(row, width);
  if (!(largest <= LARGEST)) return not_finite(row, width, false);
  const Centered centered = center(row, width, largest);
  double per_unit = reciprocal_unit(largest_magnitude(row, width), eps);
  for (int64_t i = 0; i < width; ++i) row[i] *= per_unit;
  const Pair square = row_total<double>(width, [&](auto at, int64_t i) {
    const Doubles v = at.load(row + i);
    return v * v;
  });
  per_unit *= centered.headroom;
  const double root = 1 / __builtin_sqrt(square.high / double(width) + eps * per_unit * per_unit);
  for (int64_t i = 0; i < width; ++i) row[i] *= root;
  return {root, per_unit, centered.mean};
}

template <class C>
INLINE Scale standardize(double* row, int64_t width, double eps, bool centered) {
  return centered ? layer_standardize(row, width, eps) : rms_standardize<C>(row, width, eps);
}

template <class T>
void read_row(const T* x, double* row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) row[i] = element(x + i);
}

template <class T>
__attribute__((noinline)) Scale careful_forward(const Forward& a, const T* x, T* y, bool centered) {
  using C = Compute<T>;
  const C* gain = static_cast<const C*>(a.gain);
  const C* bias = static_cast<const C*>(a.bias);
  Scratch<double> row(a.width);
  read_row(x, row.values, a.width);
  const Scale scale = standardize<C>(row.values, a.width, a.eps, centered);
  for (int64_t i = 0; i < a.width; ++i) {
    const double normed = a.round_first ? rounded_value<T>(row.values[i]) : row.values[i];
    const double product = normed * gain_at<T>(gain, i);
    put(y + i, centered ? product + gain_at<T>(bias, i) : product);
  }
  return scale;
}

template <class T>
__attribute__((noinline)) void careful_backward(
    const Backward& a, const T* dy, const T* dtotal, const T* x, T* dx, bool centered) {
  using C = Compute<T>;
  const C* gain = static_cast<const C*>(a.gain);
  Scratch<double> normed(a.width), g(a.width);
  read_row(x, normed.values, a.width);
  const Scale scale = standardize<C>(normed.values, a.width, a.eps, centered);
  double mean_g = 0, mean_product = 0;
  for (int64_t i = 0; i < a.width; ++i) {
    g.values[i] = element(dy + i) * gain_at<T>(gain, i);
    mean_g += g.values[i];
    mean_product += g.values[i] * normed.values[i];
  }
  mean_g = centered ? mean_g / double(a.width) : 0;
  mean_product /= double(a.width);
  for (int64_t i = 0; i < a.width; ++i) {
    const double normed_i = normed.values[i];
    put(dx + i, scale((g.values[i] - mean_g) - normed_i * mean_product));
    if (dtotal) put(dx + i, element(dx + i) + element(dtotal + i));
    if (a.dgain) a.dgain[i] += element(dy + i) * (a.round_first ? rounded_value<T>(normed_i) : normed_i);
    if (a.dbias) a.dbias[i] += element(dy + i);
  }
}

}  // namespace omninorm::OMNINORM_SET
