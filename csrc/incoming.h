// Row streaming: the pass that writes row i also loads row i+1 and accumulates its sums, so memory stays busy.
//
// The passes capture by value and are inlined, because captures by reference would be loaded again for each vector.
#pragma once
#include "careful.h"

namespace omninorm::OMNINORM_SET {

// A row of x, or of x + residual, which is stored in `total`. If it is stored with streaming (non-temporal) stores, the
// sum is also kept in `near`, so that it can be read again from the cache.
template <class T, bool ADD>
struct Incoming {
  const T *x, *residual;
  T *total, *sum;
  bool past_caches;

  // `near` has room for two rows, because the previous row is still read while this one is loaded.
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

  // The address at which the row can be read again after all of it has been loaded.
  const T* row() const {
    if constexpr (ADD) return sum;
    return x;
  }
};

// Does nothing with a vector, for a pass that only reads.
struct Nothing {
  template <class... Arguments>
  INLINE void operator()(Arguments...) const {}
};

}  // namespace omninorm::OMNINORM_SET
