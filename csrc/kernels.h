// The functions of an instruction set: the norms over ranges of rows. This is the only interface between the kernels,
// which do not use PyTorch, and the operators, which do no arithmetic.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace omninorm {

enum Dtype { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, DTYPES };
constexpr int64_t GAIN_PADDING = 32;

// The tensors of a call: rows of `width` elements without gaps between them. `mean` and `scale` have one element per
// row, of the compute type (double for FLOAT64, otherwise float). Gains and biases must have been prepared by
// `prepare_gain`; for FLOAT64 and FLOAT32 rows they may also be passed unprepared if they have the compute type.
struct Forward {
  int64_t width;
  double eps;
  bool round_first;      // Llama's order: x̂ is rounded to the dtype before the product with the gain
  const void* x;
  const void* residual;  // or null; otherwise x + residual, rounded, is normalized and stored in `total`
  void* total;
  const void* gain;      // γ + offset
  const void* bias;      // LayerNorm only
  void* y;
  void* mean;            // LayerNorm only
  void* scale;           // r = 1/√(mean square + ε)
  bool past_caches;      // y does not fit into the caches, so streaming stores write it without reading it first
};

struct Backward {
  int64_t width;
  double eps;
  bool round_first;
  const void* dy;
  const void* dtotal;    // or null; otherwise it is added to dx after dx is rounded
  const void* x;
  const void* mean;
  const void* scale;
  const void* gain;
  void* dx;
  double* dgain;         // or null; otherwise the sums of this range (width elements) are added to it
  double* dbias;         // or null
  bool past_caches;      // as above, for dx
};

struct Kernels {
  const char* name;
  void (*rms_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*rms_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  void (*layer_norm_forward[DTYPES])(const Forward&, int64_t begin, int64_t end);
  void (*layer_norm_backward[DTYPES])(const Backward&, int64_t begin, int64_t end);
  // Writes γ + offset in the form that the kernels for a dtype of rows need: in the compute type, and rearranged for
  // 16-bit rows. `to` has room for width + GAIN_PADDING elements.
  void (*prepare_gain[DTYPES])(Dtype of_gain, const void* gain, double offset, void* to, int64_t width);
};

// Returns the sets that were built and that this machine supports, best first; null-terminated.
const Kernels* const* runnable_sets();
// Returns the set in use: the best one, or the one that the environment variable OMNINORM_CPU or `use_set` names.
const Kernels& kernels();

}  // namespace omninorm
