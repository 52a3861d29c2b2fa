// What an instruction set offers: the norms over ranges of rows. The only interface between the kernels, which know no
// PyTorch, and the operators, which know no arithmetic.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace omninorm {

enum Dtype { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, DTYPES };

// One call's tensors: rows of `width` elements, one after another without gaps. Gains and biases are in the compute
// type (double for FLOAT64, else float), as are `mean` and `scale`, which have one element a row.
struct Forward {
  int64_t width;
  double eps;
  bool round_first;      // Llama's order: x̂ is rounded to the dtype before the gain
  const void* x;
  const void* residual;  // or null: what is normalized is x + residual, rounded, and kept in `total`
  void* total;
  const void* gain;      // γ + offset
  const void* bias;      // LayerNorm only
  void* y;
  void* mean;            // LayerNorm only
  void* scale;           // r = 1/√(mean square + ε)
};

struct Backward {
  int64_t width;
  double eps;
  bool round_first;
  const void* dy;
  const void* dtotal;    // or null: added to dx after its rounding
  const void* x;
  const void* mean;
  const void* scale;
  const void* gain;
  void* dx;              // or null
  double* dgain;         // or null: this range's sums, width elements, added to what is there
  double* dbias;         // or null
};

struct Kernels {
  const char* name;
  void (*rms_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*rms_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  void (*layer_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*layer_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  // γ + offset in the compute type of `to`: width elements of dtype `from`.
  void (*gain_to_float[DTYPES])(const void* gain, double offset, float* to, int64_t width);
  void (*gain_to_double[DTYPES])(const void* gain, double offset, double* to, int64_t width);
};

// The sets that were built and that this machine can run, best first, ended by null.
const Kernels* const* runnable_sets();
// The one in use: the best, or the one that the environment variable OMNINORM_CPU or `use_set` names.
const Kernels& kernels();

}  // namespace omninorm
