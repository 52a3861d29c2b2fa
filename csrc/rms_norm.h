// RMSNorm over rows:  x̂ = x · r,  r = 1/√(mean(x²) + ε),  y = x̂ · γ
//      and backward:  g = dy · γ,  dx = r · (g − x̂ · mean(g · x̂)),  dγ = Σ_rows dy · x̂
#pragma once
#include "careful.h"

namespace omninorm::OMNINORM_SET {

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_forward(const Forward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<C>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
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

    Pair square[1];
    row_sums<C, 1>(width, square, [&](auto at, int64_t i, V* lanes) {
      V v = at.load(x + i);
      if constexpr (ADD) {
        v = rounded<T>(v + at.load(residual + i));
        at.store(total + i, v);
      }
      lanes[0] = fma(v, v, lanes[0]);
    });
    if constexpr (ADD) x = total;

    C r = C(1 / __builtin_sqrt(square[0].high / double(width) + a.eps));
    if (__builtin_expect(ordinary(r), 1)) {
      const auto next_row = [&](int64_t i) {
        prefetch(x_next + i);
        if constexpr (ADD) prefetch(residual + width + i);
      };
      each_vector<T>(width, next_row, [&](auto at, int64_t i) {
        V normed = at.load(x + i) * r;
        if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
        at.store(y + i, normed * at.load(gain + i));
      });
    } else {
      r = careful_forward(a, x, y, false);
    }
    if (a.scale) static_cast<C*>(a.scale)[row] = r;
  }
}

// Rows that are differentiated together, so that the gain's gradient leaves the registers once for all of them.
constexpr int GROUP = 4;

template <class T, bool ADD, bool ROUND_FIRST, int ROWS>
INLINE void rms_norm_backward_group(const Backward& a, int64_t first, const Compute<T>* mean_product) {
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
    V sum{};
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const int64_t here = row * width + i;
      const V dys = at.load(dy + here);
      V normed = at.load(x + here) * scale[row];
      V v = fma(-normed, V{} + mean_product[row], dys * gains) * scale[row];
      if constexpr (ADD) v = rounded<T>(v) + at.load(dtotal + here);
      at.store(dx + here, v);
      if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
      sum = fma(dys, normed, sum);
    }
    if (a.dgain) add_to(at, a.dgain + i, sum);
  });
}

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_backward(const Backward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<C>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  for (int64_t first = begin; first < end; first += GROUP) {
    const int rows = end - first < GROUP ? int(end - first) : GROUP;
    C mean_product[GROUP];
    bool all_ordinary = true;
    for (int row = 0; row < rows; ++row) {
      const C r = static_cast<const C*>(a.scale)[first + row];
      all_ordinary = all_ordinary && ordinary(r);
      const T* dy = static_cast<const T*>(a.dy) + (first + row) * width;
      const T* x = static_cast<const T*>(a.x) + (first + row) * width;
      Pair product[1];
      row_sums<C, 1>(width, product, [&](auto at, int64_t i, V* lanes) {
        lanes[0] = fma(at.load(dy + i) * at.load(gain + i), at.load(x + i), lanes[0]);
      });
      mean_product[row] = C(product[0].high * double(r) / double(width));
    }
    if (rows == GROUP && __builtin_expect(all_ordinary, 1)) {
      rms_norm_backward_group<T, ADD, ROUND_FIRST, GROUP>(a, first, mean_product);
      continue;
    }
    for (int row = 0; row < rows; ++row) {
      if (ordinary(static_cast<const C*>(a.scale)[first + row])) {
        rms_norm_backward_group<T, ADD, ROUND_FIRST, 1>(a, first + row, mean_product + row);
      } else {
        const int64_t at = (first + row) * width;
        careful_backward(a, static_cast<const T*>(a.dy) + at, ADD ? static_cast<const T*>(a.dtotal) + at : nullptr,
                         static_cast<const T*>(a.x) + at, static_cast<T*>(a.dx) + at, false);
      }
    }
  }
}

}  // namespace omninorm::OMNINORM_SET
