// RMSNorm over rows:  x̂ = x · r,  r = 1/√(mean(x²) + ε),  y = x̂ · γ
//      and backward:  g = dy · γ,  dx = r · (g − x̂ · mean(g · x̂)),  dγ = Σ_rows dy · x̂
#pragma once
#include "careful.h"

namespace omninorm::OMNINORM_SET {

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_forward(const Forward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<T>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  // Where x + residual goes past the caches, it is read again from here.
  Scratch<T> near(ADD && a.past_caches ? width : 0);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * width;
    const T* x_next = x + width;
    T* y = static_cast<T*>(a.y) + row * width;
    T* total = ADD ? static_cast<T*>(a.total) + row * width : nullptr;
    const T* residual = ADD ? static_cast<const T*>(a.residual) + row * width : nullptr;
    const bool past_caches = a.past_caches && is_aligned(y) && is_aligned(total);
    T* const sum = past_caches ? near.values : total;

    Pair square[1];
    row_sums<T, 1>(width, square, [&](auto at, int64_t i, V* lanes) {
      V v = at.load(x + i);
      if constexpr (ADD) {
        v = rounded<T>(v + at.load(residual + i));
        at.store(sum + i, v);
        if (past_caches) at.store(total + i, v, true);
      }
      lanes[0] = fma(v, v, lanes[0]);
    });
    if constexpr (ADD) x = sum;

    C r = C(1 / __builtin_sqrt(square[0].high / double(width) + a.eps));
    if (__builtin_expect(ordinary(r), 1)) {
      const V scale = broadcast<V>(r);
      each_vector<T>(width, x_next, ADD ? residual + width : nullptr, [&](auto at, int64_t i) {
        V normed = at.load(x + i) * scale;
        if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
        at.store(y + i, normed * load_gain<T>(at, gain, i), past_caches);
      });
    } else {
      r = C(careful_forward(a, x, y, false)(1));
    }
    if (a.scale) static_cast<C*>(a.scale)[row] = r;
  }
  if (a.past_caches) end_of_stream();
}

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_backward(const Backward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<T>;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  ColumnSums<T> dgain(a.dgain, width);
  C* const of_gain = dgain.few;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * width;
    const T* x = static_cast<const T*>(a.x) + row * width;
    const T* dtotal = ADD ? static_cast<const T*>(a.dtotal) + row * width : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * width;
    const bool past_caches = a.past_caches && is_aligned(dx);
    const C r = static_cast<const C*>(a.scale)[row];
    if (__builtin_expect(!ordinary(r), 0)) {
      careful_backward(a, dy, dtotal, x, dx, false);
      continue;
    }

    const V scale = broadcast<V>(r);
    Pair product[1];  // of g and x̂: with x itself it could overflow where dx does not
    row_sums<T, 1>(width, product, [&](auto at, int64_t i, V* lanes) {
      lanes[0] = fma(at.load(dy + i) * load_gain<T>(at, gain, i), at.load(x + i) * scale, lanes[0]);
    });
    const V mean_product = broadcast<V>(-product[0].high / double(width));
    each_vector<T>(width, x + width, dy + width, [&](auto at, int64_t i) {
      const V dys = at.load(dy + i);
      V normed = at.load(x + i) * scale;
      V v = fma(normed, mean_product, dys * load_gain<T>(at, gain, i)) * scale;
      if constexpr (ADD) v = rounded<T>(v) + at.load(dtotal + i);
      at.store(dx + i, v, past_caches);
      if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
      if (of_gain) write(of_gain + i, fma(dys, normed, read<V>(of_gain + i)));
    });
    dgain.row_done();
  }
  if (a.past_caches) end_of_stream();
}

}  // namespace omninorm::OMNINORM_SET
