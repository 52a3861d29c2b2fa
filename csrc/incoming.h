// Rows on their way in. A pass that writes one row reads the next one too, and takes its sums: so memory is never idle.
//
// The passes capture by value and are inlined: what is captured by reference would be loaded anew for each vector.
#pragma once
#include "careful.h"

namespace omninorm::OMNINORM_SET {

// A row of x, or of x + residual, which is kept in `total`; where that is written past the caches the sum also stays in
// `near`, to be read again from there.
template <class T, bool ADD>
struct Incoming {
  const T *x, *residual;
  T *total, *sum;
  bool past_caches;

  // `near` has room for two rows: the one before is still read while this one comes in.
  Incoming(const Forward& a, int64_t row, T* near) : x(static_cast<const T*>(a.x) + row * a.width) {
    if constexpr (ADD) {
      residual = static_cast<const T*>(a.residual) + row * a.width;
      total = static_cast<T*>(a.total) + row * a.width;
      past_caches = a.past_caches && is_aligned(total);
      sum = past_caches ? near + row % 2 * a.width : total;
    }
  }

  template <class At>
  INLINE Vector<T> load(At at, int64_t i) const {
    FETCH(x + i + AHEAD<T>);
    if constexpr (ADD) {
      FETCH(residual + i + AHEAD<T>);
      const Vector<T> v = rounded<T>(at.load(x + i) + at.load(residual + i));
      at.store(sum + i, v);
      if (past_caches) at.store(total + i, v, true);
      return v;
    } else {
      return at.load(x + i);
    }
  }

  // Where the row can be read again, once all of it has been loaded.
  const T* row() const {
    if constexpr (ADD) return sum;
    return x;
  }
};

// Does nothing with a vector: for a pass that only reads.
struct Nothing {
  template <class... Arguments>
  INLINE void operator()(Arguments...) const {}
};

}  // namespace omninorm::OMNINORM_SET
