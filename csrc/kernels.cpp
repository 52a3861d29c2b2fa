// The norms for the instruction set OMNINORM_SET. This file is compiled once per set, with AVX-512 only for 16-bit
// rows; see select.cpp.
#include "kernels.h"

#include "layer_norm.h"
#include "rms_norm.h"

namespace omninorm::OMNINORM_SET {

template <class T>
void rms_norm_forward_any(const Forward& a, int64_t begin, int64_t end) {
  // Rounding x̂ to the dtype changes nothing if the dtype is the compute type.
  const bool round_first = a.round_first && sizeof(T) == 2;
  if (a.residual) {
    round_first ? rms_norm_forward<T, true, true>(a, begin, end) : rms_norm_forward<T, true, false>(a, begin, end);
  } else {
    round_first ? rms_norm_forward<T, false, true>(a, begin, end) : rms_norm_forward<T, false, false>(a, begin, end);
  }
}

template <class T>
void rms_norm_backward_any(const Backward& a, int64_t begin, int64_t end) {
  const bool round_first = a.round_first && sizeof(T) == 2;
  if (a.dtotal) {
    round_first ? rms_norm_backward<T, true, true>(a, begin, end) : rms_norm_backward<T, true, false>(a, begin, end);
  } else {
    round_first ? rms_norm_backward<T, false, true>(a, begin, end) : rms_norm_backward<T, false, false>(a, begin, end);
  }
}

template <class T>
void layer_norm_forward_any(const Forward& a, int64_t begin, int64_t end) {
  a.residual ? layer_norm_forward<T, true>(a, begin, end) : layer_norm_forward<T, false>(a, begin, end);
}

template <class T>
void layer_norm_backward_any(const Backward& a, int64_t begin, int64_t end) {
  a.dtotal ? layer_norm_backward<T, true>(a, begin, end) : layer_norm_backward<T, false>(a, begin, end);
}

INLINE Floats settled(Floats v) { return (v == v) ? v : Floats{} + __builtin_nanf(""); }
INLINE EvenOdd settled(EvenOdd v) { return {settled(v.even), settled(v.odd)}; }
INLINE Doubles settled(Doubles v) { return v; }

// Converts a gain or bias of dtype T for rows of X; see load_gain. NaNs lose their lower bits, as narrow() requires.
template <class X, class T>
void prepare_gain(const void* gain, double offset, void* to, int64_t width) {
  using V = Vector<X>;
  constexpr int N = LANES<X>;
  const T* from = static_cast<const T*>(gain);
  Compute<X>* values = static_cast<Compute<X>*>(to);
  const auto prepare = [&](auto at, int64_t i) {
    V v;
    if constexpr (IS_SAME<X, T>) {
      v = at.load(from + i);
    } else {
      Compute<X> ordered[N] = {};
      for (int lane = 0; lane < N && i + lane < width; ++lane) ordered[lane] = Compute<X>(element(from + i + lane));
      v = arranged<V>(ordered);
    }
    return settled(v + broadcast<V>(offset));
  };
  int64_t i = 0;
  for (; i + N <= width; i += N) write(values + i, prepare(Whole{}, i));
  if (i < width) write(values + i, prepare(Part{int(width - i)}, i));
}
template <class X>
void prepare_gain_any(Dtype dtype, const void* gain, double offset, void* to, int64_t width) {
  switch (dtype) {
    case FLOAT64:
      return prepare_gain<X, double>(gain, offset, to, width);
    case FLOAT32:
      return prepare_gain<X, float>(gain, offset, to, width);
    case BFLOAT16:
      return prepare_gain<X, BFloat16>(gain, offset, to, width);
    default:
      return prepare_gain<X, Float16>(gain, offset, to, width);
  }
}

#if defined(__AVX512F__)
#define OF_EVERY_DTYPE(function) {nullptr, nullptr, function<BFloat16>, function<Float16>}
#else
#define OF_EVERY_DTYPE(function) {function<double>, function<float>, function<BFloat16>, function<Float16>}
#endif
#define NAME_OF(set) #set
#define QUOTED(set) NAME_OF(set)

extern const Kernels KERNELS = {
    QUOTED(OMNINORM_SET),
    OF_EVERY_DTYPE(rms_norm_forward_any),
    OF_EVERY_DTYPE(rms_norm_backward_any),
    OF_EVERY_DTYPE(layer_norm_forward_any),
    OF_EVERY_DTYPE(layer_norm_backward_any),
    OF_EVERY_DTYPE(prepare_gain_any),
};

}  // namespace omninorm::OMNINORM_SET
