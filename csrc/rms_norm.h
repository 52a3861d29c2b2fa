// RMSNorm over rows:  x̂ = x · r,  r = 1/√(mean(x²) + ε),  y = x̂ · γ
//      and backward:  g = dy · γ,  dx = r · (g − x̂ · mean(g · x̂)),  dγ = Σ_rows dy · x̂
#pragma once
#include "incoming.h"

namespace omninorm::OMNINORM_SET {

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_forward(const Forward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<T>;
  if (begin == end) return;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  Scratch<T> near(ADD && a.past_caches ? 2 * width : 0);
  Incoming<T, ADD> incoming(a, begin, near.values);
  Pair square[1];
  const auto read_row = [&](auto also) INLINED {
    const Incoming<T, ADD> next = incoming;
    row_sums<T, 1>(width, square, [=](auto at, int64_t i, V* lanes) INLINED {
      also(at, i);
      const V v = next.load(at, i);
      lanes[0] = fma(v, v, lanes[0]);
    });
  };

  read_row(Nothing{});
  for (int64_t row = begin; row < end; ++row) {
    const T* x = incoming.row();
    T* y = static_cast<T*>(a.y) + row * width;
    const bool past_caches = a.past_caches && is_aligned(y);
    const bool more = row + 1 < end;
    if (more) incoming = Incoming<T, ADD>(a, row + 1, near.values);

    C r = C(1 / __builtin_sqrt(square[0].high / double(width) + a.eps));
    if (__builtin_expect(ordinary(r), 1)) {
      const V scale = broadcast<V>(r);
      const auto write_vector = [=](auto at, int64_t i) INLINED {
        V normed = at.load(x + i) * scale;
        if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
        at.store(y + i, normed * load_gain<T>(at, gain, i), past_caches);
      };
      more ? read_row(write_vector) : each_vector<T>(width, write_vector);
    } else {
      r = C(careful_forward(a, x, y, false)(1));
      if (more) read_row(Nothing{});
    }
    if (a.scale) static_cast<C*>(a.scale)[row] = r;
  }
  if (a.past_caches) end_of_stream();
}

template <class T, bool ADD, bool ROUND_FIRST>
void rms_norm_backward(const Backward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<T>;
  if (begin == end) return;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  const C* scales = static_cast<const C*>(a.scale);
  ColumnSums<T> dgain(a.dgain, width);
  C* const of_gain = dgain.few;
  Pair product[1];  // the product of g and x̂; with x itself it could overflow although dx does not
  const auto read_row = [&](int64_t row, auto also) INLINED {
    const T* dy = static_cast<const T*>(a.dy) + row * width;
    const T* x = static_cast<const T*>(a.x) + row * width;
    const V scale = broadcast<V>(scales[row]);
    row_sums<T, 1>(width, product, [=](auto at, int64_t i, V* lanes) INLINED {
      FETCH(dy + i + AHEAD<T>);
      FETCH(x + i + AHEAD<T>);
      const V gains = load_gain<T>(at, gain, i);
      also(at, i, gains);
      lanes[0] = fma(at.load(dy + i) * gains, at.load(x + i) * scale, lanes[0]);
    });
  };

  read_row(begin, Nothing{});
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(a.dy) + row * width;
    const T* x = static_cast<const T*>(a.x) + row * width;
    const T* dtotal = ADD ? static_cast<const T*>(a.dtotal) + row * width : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * width;
    const bool past_caches = a.past_caches && is_aligned(dx);
    const bool more = row + 1 < end;
    if (__builtin_expect(!ordinary(scales[row]), 0)) {
      careful_backward(a, dy, dtotal, x, dx, false);
      if (more) read_row(row + 1, Nothing{});
      continue;
    }

    const V scale = broadcast<V>(scales[row]);
    const V mean_product = broadcast<V>(-product[0].high / double(width));
    const auto write_vector = [=](auto at, int64_t i, V gains) INLINED {
      const V dys = at.load(dy + i);
      V normed = at.load(x + i) * scale;
      V v = fma(normed, mean_product, dys * gains) * scale;
      if constexpr (ADD) v = rounded<T>(v) + at.load(dtotal + i);
      at.store(dx + i, v, past_caches);
      if constexpr (ROUND_FIRST) normed = rounded<T>(normed);
      if (of_gain) write(of_gain + i, fma(dys, normed, read<V>(of_gain + i)));
    };
    if (more) {
      read_row(row + 1, write_vector);
    } else {
      each_vector<T>(width, [=](auto at, int64_t i) INLINED { write_vector(at, i, load_gain<T>(at, gain, i)); });
    }
    dgain.row_done();
  }
  if (a.past_caches) end_of_stream();
}

}  // namespace omninorm::OMNINORM_SET
