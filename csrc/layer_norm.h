// LayerNorm over rows:  x̂ = (x − μ) · r,  r = 1/√(mean((x − μ)²) + ε),  y = x̂ · γ + β
//        and backward:  g = dy · γ,  dx = r · (g − mean(g) − x̂ · mean(g · x̂)),  dγ = Σ_rows dy · x̂,  dβ = Σ_rows dy
//
// μ is subtracted in two parts: `high`, its value in the compute type, and the rest, which is subtracted as rest · r
// after the multiplication: x̂ = (x − high) · r − rest · r. So no digits are lost if the mean is large compared with
// the spread, or so small that the compute type can't represent its rest. A constant row becomes exactly β.
#pragma once
#include "incoming.h"

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
  using V = Vector<T>;
  if (begin == end) return;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  const C* bias = static_cast<const C*>(a.bias);
  Scratch<T> near(ADD && a.past_caches ? 2 * width : 0);
  Incoming<T, ADD> incoming(a, begin, near.values);
  Pair sum;
  const auto read_row = [&](auto also) INLINED {
    const Incoming<T, ADD> next = incoming;
    sum = row_total<T>(width, [=](auto at, int64_t i) INLINED {
      also(at, i);
      return next.load(at, i);
    });
  };

  read_row(Nothing{});
  for (int64_t row = begin; row < end; ++row) {
    const T* x = incoming.row();
    T* y = static_cast<T*>(a.y) + row * width;
    const bool past_caches = a.past_caches && is_aligned(y);
    const bool more = row + 1 < end;
    if (more) incoming = Incoming<T, ADD>(a, row + 1, near.values);

    Mean<C> mean(sum, width);
    const V high = broadcast<V>(mean.high), rest = broadcast<V>(mean.rest);
    Pair square[1];
    row_sums<T, 1>(width, square, [=](auto at, int64_t i, V* lanes) INLINED {
      const V deviation = at.template only<T>((at.load(x + i) - high) - rest);
      lanes[0] = fma(deviation, deviation, lanes[0]);
    });

    C r = C(1 / __builtin_sqrt(square[0].high / double(width) + a.eps));
    if (__builtin_expect(ordinary(r), 1)) {
      const V scale = broadcast<V>(r), shift = broadcast<V>(-mean.rest * double(r));
      const auto write_vector = [=](auto at, int64_t i) INLINED {
        const V normed = fma(at.load(x + i) - high, scale, shift);
        at.store(y + i, fma(normed, load_gain<T>(at, gain, i), load_gain<T>(at, bias, i)), past_caches);
      };
      more ? read_row(write_vector) : each_vector<T>(width, write_vector);
    } else {
      const Scale careful = careful_forward(a, x, y, true);
      r = C(careful(1));
      mean.high = C(careful.mean);
      if (more) read_row(Nothing{});
    }
    if (a.mean) static_cast<C*>(a.mean)[row] = mean.high;
    if (a.scale) static_cast<C*>(a.scale)[row] = r;
  }
  if (a.past_caches) end_of_stream();
}

template <class T, bool ADD>
void layer_norm_backward(const Backward& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vector<T>;
  if (begin == end) return;
  const int64_t width = a.width;
  const C* gain = static_cast<const C*>(a.gain);
  const C* means = static_cast<const C*>(a.mean);
  const C* scales = static_cast<const C*>(a.scale);
  ColumnSums<T> dgain(a.dgain, width), dbias(a.dbias, width);
  C* const of_gain = dgain.few;
  C* const of_bias = dbias.few;
  // Rows of bfloat16 need two registers per vector, so there are not enough registers to read and write together.
  constexpr bool AT_ONCE = sizeof(V) == BYTES;
  Pair sums[3];  // the sums of g, g · u and u, with u = (x − high) · r
  const auto read_row = [&](int64_t row, auto also) INLINED {
    const T* dy = static_cast<const T*>(a.dy) + row * width;
    const T* x = static_cast<const T*>(a.x) + row * width;
    const V high = broadcast<V>(means[row]), scale = broadcast<V>(scales[row]);
    row_sums<T, 3>(width, sums, [=](auto at, int64_t i, V* lanes) INLINED {
      if constexpr (AT_ONCE) {
        FETCH(dy + i + AHEAD<T>);
        FETCH(x + i + AHEAD<T>);
      }
      const V gains = load_gain<T>(at, gain, i);
      also(at, i, gains);
      const V g = at.load(dy + i) * gains;
      const V u = at.template only<T>((at.load(x + i) - high) * scale);
      lanes[0] += g;
      lanes[1] = fma(g, u, lanes[1]);
      lanes[2] += u;
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
      careful_backward(a, dy, dtotal, x, dx, true);
      if (more) read_row(row + 1, Nothing{});
      continue;
    }

    const V high = broadcast<V>(means[row]), scale = broadcast<V>(scales[row]);
    const double mean_of_g = sums[0].high / double(width);
    const double rest = sums[2].high / double(width);  // the rest of the mean, multiplied by r: x̂ = u − rest
    const V mean_g = broadcast<V>(mean_of_g), shift = broadcast<V>(-rest);
    const V mean_product = broadcast<V>(-(sums[1].high / double(width) - rest * mean_of_g));
    const auto write_vector = [=](auto at, int64_t i, V gains) INLINED {
      const V dys = at.load(dy + i);
      const V normed = fma(at.load(x + i) - high, scale, shift);
      V v = fma(normed, mean_product, dys * gains - mean_g) * scale;
      if constexpr (ADD) v = rounded<T>(v) + at.load(dtotal + i);
      at.store(dx + i, v, past_caches);
      if (of_gain) write(of_gain + i, fma(dys, normed, read<V>(of_gain + i)));
      if (of_bias) write(of_bias + i, read<V>(of_bias + i) + dys);
    };
    if (AT_ONCE && more) {
      read_row(row + 1, write_vector);
    } else {
      each_vector<T>(width, [=](auto at, int64_t i) INLINED {
        FETCH(dy + i + width);
        FETCH(x + i + width);
        write_vector(at, i, load_gain<T>(at, gain, i));
      });
      if (more) read_row(row + 1, Nothing{});
    }
    dgain.row_done();
    dbias.row_done();
  }
  if (a.past_caches) end_of_stream();
}

}  // namespace omninorm::OMNINORM_SET
