// The functions of an instruction set: the norms over ranges of rows. This is the only interface between the kernels,
// which do not use PyTorch, and the operators, which do no arithmetic.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace omninorm {

enum Dtype { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, DTYPES };
constexpr int64_t GAIN_PADDING = 32;

// One call's tensors: rows of `width` elements, one after another without gaps. `mean` and `scale` have one element a
// row, of the compute type (double for FLOAT64, else float). Gains and biases were prepared by `prepare_gain`; those of
// FLOAT64 and FLOAT32 rows may also be given as they are, if they are of the compute type.
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
  bool past_caches;      // y is larger than they are: it need not be read into them before it is written
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
  void* dx;
  double* dgain;         // or null: this range's sums, width elements, added to what is there
  double* dbias;         // or null
  bool past_caches;      // as above, for dx
};

struct Kernels {
  const char* name;
  void (*rms_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*rms_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  void (*layer_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*layer_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  // γ + offset as the kernels of rows of a dtype want it: in the compute type, and for 16-bit rows in an order of their
  // own. `to` has room for GAIN_PADDING elements more than width.
  void (*prepare_gain[DTYPES])(Dtype of_gain, const void* gain, double offset, void* to, int64_t width);
};

// The sets that were built and that this machine supports, best first; null-terminated.
const Kernels* const* runnable_sets();
// The one in use: the best, or the one that the environment variable OMNINORM_CPU or `use_set` names.
const Kernels& kernels();

}  // namespace omninorm
