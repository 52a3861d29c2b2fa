// The norms for one instruction set, OMNINORM_SET; compiled once for each.
#include "kernels.h"

#include "layer_norm.h"

namespace omninorm::OMNINORM_SET {

template <class T>
void rms_norm_forward_any(const Forward& a, int64_t begin, int64_t end) {
  // Rounding x̂ to the dtype changes nothing where that is the compute type.
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

// Every dtype's gain in the compute type.
template <class T>
void gain_to_float(const void* gain, double offset, float* to, int64_t width) {
  const T* from = static_cast<const T*>(gain);
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < width; ++i) to[i] = float(from[i]) + float(offset);
  } else {
    each_vector<T>(width, [&](auto at, int64_t i) { at.store(to + i, settled(at.load(from + i) + float(offset))); });
  }
}

template <class T>
void gain_to_double(const void* gain, double offset, double* to, int64_t width) {
  const T* from = static_cast<const T*>(gain);
  for (int64_t i = 0; i < width; ++i) to[i] = get(from + i) + offset;
}

#define OF_EVERY_DTYPE(function) {function<double>, function<float>, function<BFloat16>, function<Float16>}
#define NAME_OF(set) #set
#define QUOTED(set) NAME_OF(set)

extern const Kernels KERNELS = {
    QUOTED(OMNINORM_SET),
    OF_EVERY_DTYPE(rms_norm_forward_any),
    OF_EVERY_DTYPE(rms_norm_backward_any),
    OF_EVERY_DTYPE(layer_norm_forward_any),
    OF_EVERY_DTYPE(layer_norm_backward_any),
    OF_EVERY_DTYPE(gain_to_float),
    OF_EVERY_DTYPE(gain_to_double),
};

}  // namespace omninorm::OMNINORM_SET
