// Selects the instruction set: the best that was built and that this machine supports, unless OMNINORM_CPU names
// another. The extern "C" functions are called from Python through ctypes.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace omninorm {

#define DECLARE(set)               \
  namespace set {                  \
  extern const Kernels KERNELS;    \
  }
#if defined(OMNINORM_HAS_AVX512)  // only together with AVX2
DECLARE(avx512)
#endif
#if defined(OMNINORM_HAS_AVX2)
DECLARE(avx2)
#endif
#if defined(OMNINORM_HAS_NEON)
DECLARE(neon)
#endif
#if defined(OMNINORM_HAS_BASELINE)
DECLARE(baseline)
#endif

namespace {

#if defined(OMNINORM_HAS_AVX512)
// AVX-512 is used only for 16-bit rows, whose conversions are compute-bound. Rows of 32 and 64 bits are memory-bound,
// and faster with AVX2's shorter registers (Zen 4: 0.7 to 0.95 × the time).
Kernels avx512_and_avx2() {
  Kernels both = avx512::KERNELS;
  const Kernels& narrow = avx2::KERNELS;
  for (const Dtype dtype : {FLOAT64, FLOAT32}) {
    both.rms_norm_forward[dtype] = narrow.rms_norm_forward[dtype];
    both.rms_norm_backward[dtype] = narrow.rms_norm_backward[dtype];
    both.layer_norm_forward[dtype] = narrow.layer_norm_forward[dtype];
    both.layer_norm_backward[dtype] = narrow.layer_norm_backward[dtype];
    both.prepare_gain[dtype] = narrow.prepare_gain[dtype];
  }
  return both;
}
#endif

struct Runnable {
  const Kernels* sets[5] = {};

  Runnable() {
    int count = 0;
#if defined(OMNINORM_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      static const Kernels wide = avx512_and_avx2();
      sets[count++] = &wide;
    }
#endif
#if defined(OMNINORM_HAS_AVX2)
    // Every processor with AVX2 that was sold can also convert float16.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets[count++] = &avx2::KERNELS;
#endif
#if defined(OMNINORM_HAS_NEON)
    sets[count++] = &neon::KERNELS;
#endif
#if defined(OMNINORM_HAS_BASELINE)
    sets[count++] = &baseline::KERNELS;
#endif
  }
};

const Kernels* find(const char* name) {
  for (const Kernels* const* set = runnable_sets(); *set; ++set)
    if (std::strcmp((*set)->name, name) == 0) return *set;
  return nullptr;
}

const Kernels* first_choice() {
  const char* wish = std::getenv("OMNINORM_CPU");
  const Kernels* named = wish ? find(wish) : nullptr;
  return named ? named : runnable_sets()[0];  // omninorm.kernels.cpu raises an error for an unknown name
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{first_choice()};
  return kernels;
}

}  // namespace

const Kernels* const* runnable_sets() {
  static const Runnable runnable;
  return runnable.sets;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace omninorm

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns the name of the i-th supported set, best first; null after the last.
EXPORTED const char* omninorm_runnable_set(int i) {
  const omninorm::Kernels* const* set = omninorm::runnable_sets();
  while (*set && i-- > 0) ++set;
  return *set ? (*set)->name : nullptr;
}

EXPORTED const char* omninorm_current_set() { return omninorm::kernels().name; }

// Returns 1, or 0 if the set is not supported; then nothing changes.
EXPORTED int omninorm_use_set(const char* name) {
  const omninorm::Kernels* found = omninorm::find(name);
  if (found) omninorm::current().store(found, std::memory_order_relaxed);
  return found != nullptr;
}
