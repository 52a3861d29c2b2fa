// LayerNorm over rows:  x̂ = (x − μ) · r,  r = 1/√(mean((x − μ)²) + ε),  y = x̂ · γ + β
//        and backward:  g = dy · γ,  dx = r · (g − mean(g) − x̂ · mean(g · x̂)),  dγ = Σ_rows dy · x̂,  dβ = Σ_rows dy
//
// μ is subtracted in two parts, what the compute type holds of it and the rest, the second as rest · r after the
// multiplication: x̂ = (x − high) · r − rest · r. So a mean that is large beside the spread costs no digits, nor does one
// so small that the compute type can't hold its rest; and a constant row becomes exactly β.
#pragma once
#include "rms_norm.h"

namespace omninorm::OMNINORM_SET {

// μ = high + rest.
template <class C>
struct Mean {
  C high;
  double rest;

  Mean(Pair sum, int64_t width) {
    const Pair mean = divided(sum, width);
    high = C(mean.high);
    rest = (mean.high - double(high)) + mean.low;
  }
};

template <class T, bool ADD>
void layer_norm_forward(const Forward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<C>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  const C* bias = static_cast<const C*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * width;
    const T* x_next = x + width;
    T* y = static_cast<T*>(a.y) + row * width;
    T* total = nullptr;
    const T* residual = nullptr;
    if constexpr (ADD) {
      total = static_cast<T*>(a.total) + row * width;
      residual = static_cast<const T*>(a.residual) + row * width;
    }

    const Mean<C> mean(row_total<C>(width, [&](auto at, int64_t i) {
      V v = at.load(x + i);
      if constexpr (ADD) {
        v = rounded<T>(v + at.load(residual + i));
        at.store(total + i, v);
      }
      return v;
    }), width);
    if constexpr (ADD) x = total;
    Pair square[1];
    row_sums<C, 1>(width, square, [&](auto at, int64_t i, V* lanes) {
      const V deviation = at.only((at.load(x + i) - mean.high) - C(mean.rest));
      lanes[0] = fma(deviation, deviation, lanes[0]);
    });

    C r = C(1 / __builtin_sqrt(square[0].high / double(width) + a.eps));
    if (__builtin_expect(ordinary(r), 1)) {
      const V shift = V{} - C(mean.rest * double(r));
      const auto next_row = [&](int64_t i) {
        prefetch(x_next + i);
        if constexpr (ADD) prefetch(residual + width + i);
      };
      each_vector<T>(width, next_row, [&](auto at, int64_t i) {
        const V normed = fma(at.load(x + i) - mean.high, V{} + r, shift);
        at.store(y + i, fma(normed, at.load(gain + i), at.load(bias + i)));
      });
    } else {
      r = careful_forward(a, x, y, true);
    }
    if (a.mean) static_cast<C*>(a.mean)[row] = mean.high;
    if (a.scale) static_cast<C*>(a.scale)[row] = r;
  }
}

// A row's constants in the backward pass.
template <class C>
struct RowOfLayerNorm {
  C mean, shift, mean_g, mean_product;
};

template <class T, bool ADD, int ROWS>
INLINE void layer_norm_backward_group(const Backward& a, int64_t first, const RowOfLayerNorm<Compute<T>>* rows) {
  using C = Compute<T>;
  using V = Vector<C>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  const T* dy = static_cast<const T*>(a.dy) + first * width;
  const T* x = static_cast<const T*>(a.x) + first * width;
  const C* scale = static_cast<const C*>(a.scale) + first;
  const T* dtotal = ADD ? static_cast<const T*>(a.dtotal) + first * width : nullptr;
  T* dx = static_cast<T*>(a.dx) + first * width;

  const auto next_rows = [&](int64_t i) {
    for (int row = 0; row < ROWS; ++row) {
      prefetch_far(x + (ROWS + row) * width + i);
      prefetch_far(dy + (ROWS + row) * width + i);
    }
  };
  each_vector<T>(width, next_rows, [&](auto at, int64_t i) {
    const V gains = at.load(gain + i);
    V sum{}, sum_of_dy{};
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const int64_t here = row * width + i;
      const V dys = at.load(dy + here);
      const V normed = fma(at.load(x + here) - rows[row].mean, V{} + scale[row], V{} + rows[row].shift);
      V v = fma(-normed, V{} + rows[row].mean_product, dys * gains - rows[row].mean_g) * scale[row];
      if constexpr (ADD) v = rounded<T>(v) + at.load(dtotal + here);
      at.store(dx + here, v);
      sum = fma(dys, normed, sum);
      sum_of_dy += dys;
    }
    if (a.dgain) add_to(at, a.dgain + i, sum);
    if (a.dbias) add_to(at, a.dbias + i, sum_of_dy);
  });
}

template <class T, bool ADD>
void layer_norm_backward(const Backward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<C>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  for (int64_t first = begin; first < end; first += GROUP) {
    const int count = end - first < GROUP ? int(end - first) : GROUP;
    RowOfLayerNorm<C> rows[GROUP];
    bool all_ordinary = true;
    for (int row = 0; row < count; ++row) {
      const C r = static_cast<const C*>(a.scale)[first + row];
      const C mean = static_cast<const C*>(a.mean)[first + row];
      all_ordinary = all_ordinary && ordinary(r);
      const T* dy = static_cast<const T*>(a.dy) + (first + row) * width;
      const T* x = static_cast<const T*>(a.x) + (first + row) * width;
      Pair sums[3];  // of g, g · (x − mean), x − mean
      row_sums<C, 3>(width, sums, [&](auto at, int64_t i, V* lanes) {
        const V g = at.load(dy + i) * at.load(gain + i);
        const V deviation = at.only(at.load(x + i) - mean);
        lanes[0] += g;
        lanes[1] = fma(g, deviation, lanes[1]);
        lanes[2] += deviation;
      });
      const double mean_g = sums[0].high / double(width);
      const double rest = sums[2].high / double(width);
      const double product = (sums[1].high / double(width) - rest * mean_g) * double(r);
      rows[row] = {mean, C(-rest * double(r)), C(mean_g), C(product)};
    }
    if (count == GROUP && __builtin_expect(all_ordinary, 1)) {
      layer_norm_backward_group<T, ADD, GROUP>(a, first, rows);
      continue;
    }
    for (int row = 0; row < count; ++row) {
      if (ordinary(static_cast<const C*>(a.scale)[first + row])) {
        layer_norm_backward_group<T, ADD, 1>(a, first + row, rows + row);
      } else {
        const int64_t at = (first + row) * width;
        careful_backward(a, static_cast<const T*>(a.dy) + at, ADD ? static_cast<const T*>(a.dtotal) + at : nullptr,
                         static_cast<const T*>(a.x) + at, static_cast<T*>(a.dx) + at, true);
      }
    }
  }
}

}  // namespace omninorm::OMNINORM_SET
