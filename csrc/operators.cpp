// The operators of the CPU back end, on PyTorch's stable ABI. They check arguments, allocate results, divide the rows
// among PyTorch's threads, and call the functions in kernels.h for the arithmetic. Python calls them through
// kernels/operators.py, which also has the meta kernels; the derivatives are in kernels/autograd.py and
// kernels/exported.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using omninorm::Backward;
using omninorm::Dtype;
using omninorm::Forward;
using omninorm::Kernels;
using omninorm::kernels;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Minimum number of elements per thread. Waking a thread takes as long as normalizing about ten thousand elements.
constexpr int64_t GRAIN = 32768;
// A gain's gradient is summed over blocks of rows and then over the blocks, so that its bits depend only on the shape.
// The sums of a block are written and read once; with this many rows per block, the cost is negligible.
// kernels/autograd.py passes these numbers to probes.
constexpr int64_t BLOCK_ROWS = 64;
constexpr int64_t MOST_BLOCKS = 256;

// The size of a core's second-level cache, as reported by Linux.
int64_t own_cache() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index2/size");
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size)) return int64_t(1) << 20;
  file >> unit;
  return size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
}

// Results of at least this many bytes use streaming (non-temporal) stores: they and the input together do not fit into a
// core's cache. Time relative to ordinary stores, measured with the next consumer (Zen 4, AVX-512 and AVX2, 0.6 to
// 32 MB): the norm alone 0.5 to 0.9; with a linear layer 0.95 to 1.03; with a multiplication 0.72 to 1.05, but 1.25 and
// 1.14 for 1.2 and 2 MB of float32 with AVX-512; the backward pass with an addition 0.83 to 1.12.
int64_t stream_from() {
  static const int64_t half = own_cache() / 2;
  return half;
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return omninorm::FLOAT64;
    case ScalarType::Float:
      return omninorm::FLOAT32;
    case ScalarType::BFloat16:
      return omninorm::BFLOAT16;
    case ScalarType::Half:
      return omninorm::FLOAT16;
    default:
      STD_TORCH_CHECK(false, "omninorm: the dtype must be float16, bfloat16, float32 or float64");
  }
}

// Returns a new contiguous tensor. It calls the C function, because the dispatcher would box six optional arguments.
Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::array<int64_t, 8> few;
  std::vector<int64_t> many(sizes.size() > few.size() ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The rows of a tensor (…, width), contiguous; a copy only if the strides require one.
struct Rows {
  Tensor tensor;
  int64_t width, count;
  Dtype dtype;

  explicit Rows(const Tensor& given) : tensor(given), dtype(dtype_of(given)) {
    STD_TORCH_CHECK(given.is_cpu(), "omninorm: the tensor must be on the CPU");
    STD_TORCH_CHECK(given.dim() > 0 && given.size(-1) > 0, "omninorm: x must have a last dimension of width >= 1");
    if (!given.is_contiguous()) tensor = torch::stable::contiguous(given);
    width = given.size(-1);
    count = given.numel() / width;
  }

  int element_size() const { return dtype == omninorm::FLOAT64 ? 8 : dtype == omninorm::FLOAT32 ? 4 : 2; }
  // ε, rounded to the compute type.
  double rounded_eps(double eps) const { return dtype == omninorm::FLOAT64 ? eps : double(float(eps)); }
  int64_t bytes() const { return count * width * element_size(); }
  ScalarType compute_type() const { return dtype == omninorm::FLOAT64 ? ScalarType::Double : ScalarType::Float; }
  const void* data() const { return tensor.const_data_ptr(); }

  // Returns another tensor with x's shape and dtype.
  Rows like(const Tensor& other) const {
    const Rows rows(other);
    STD_TORCH_CHECK(rows.dtype == dtype && same_shape(rows.tensor), "omninorm: tensors must agree in shape and dtype");
    return rows;
  }

  bool same_shape(const Tensor& other) const {
    const auto a = tensor.sizes(), b = other.sizes();
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
  }

  Tensor empty_like() const { return empty(tensor.sizes(), tensor.scalar_type()); }
  Tensor one_per_row() const { return empty(IntHeaderOnlyArrayRef(&count, 1), compute_type()); }
};

// A gain or bias in the form that this set's kernels need; filled with `fill` if there is none.
class Gain {
 public:
  Gain(const Kernels& set, const MaybeTensor& given, double offset, double fill, const Rows& x) {
    if (given) check(*given, x);
    const bool as_it_is = given && offset == 0 && x.element_size() >= 4 && given->is_contiguous() &&
                          given->scalar_type() == x.compute_type();
    if (as_it_is) {
      data_ = given->const_data_ptr();
      return;
    }
    // Room for either compute type, and for an alignment to a cache line.
    prepared_.reset(new double[x.width + omninorm::GAIN_PADDING + 8]);
    void* const to = prepared_.get() + (64 - reinterpret_cast<uintptr_t>(prepared_.get()) % 64) / sizeof(double);
    data_ = to;
    const auto prepare = set.prepare_gain[x.dtype];
    if (!given) {
      const std::vector<double> filled(x.width, fill);
      prepare(omninorm::FLOAT64, filled.data(), 0, to, x.width);
      return;
    }
    const Tensor gain = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    prepare(dtype_of(gain), gain.const_data_ptr(), offset, to, x.width);
  }

  const void* data() const { return data_; }

 private:
  static void check(const Tensor& gain, const Rows& x) {
    STD_TORCH_CHECK(gain.is_cpu(), "omninorm: the gain must be on the CPU");
    STD_TORCH_CHECK(gain.dim() == 1 && gain.size(0) == x.width, "omninorm: the gain must have shape (", x.width, ",)");
  }

  std::unique_ptr<double[]> prepared_;
  const void* data_ = nullptr;
};

template <class Run>
void for_rows(const Rows& x, int64_t rows_at_once, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / (x.width * rows_at_once));
  const int64_t units = (x.count + rows_at_once - 1) / rows_at_once;
  if (units <= grain) {
    if (units > 0) run(0, units);
    return;
  }
  torch::stable::parallel_for(0, units, grain, run);
}

void check_constants(double eps, double gain_offset) {
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(float(eps)) && std::isfinite(float(gain_offset)),
                  "omninorm: eps must be >= 0 and finite in float32, and the gain offset too");
}

// Forward ---------------------------------------------------------------------------------------------------------

// The results of a forward pass: `total` only with a residual, the statistics only if a backward pass needs them.
struct Results {
  Tensor y;
  MaybeTensor total, mean, scale;
};

enum Statistics { FORGET, KEEP };

Forward forward_of(const Rows& x, const Gain& gain, double eps) {
  Forward a{};
  a.width = x.width;
  a.eps = x.rounded_eps(eps);
  a.x = x.data();
  a.gain = gain.data();
  return a;
}

Results run_forward(Forward a, void (*kernel)(const Forward&, int64_t, int64_t), const Rows& x,
                    const MaybeTensor& residual, Statistics statistics) {
  Results made{x.empty_like(), {}, {}, {}};
  std::optional<Rows> added;
  if (residual) {
    added.emplace(x.like(*residual));
    made.total = x.empty_like();
    a.residual = added->data();
    a.total = made.total->mutable_data_ptr();
  }
  if (statistics == KEEP) {
    made.scale = x.one_per_row();
    a.scale = made.scale->mutable_data_ptr();
    if (a.bias) made.mean = x.one_per_row();
    if (a.bias) a.mean = made.mean->mutable_data_ptr();
  }
  a.y = made.y.mutable_data_ptr();
  a.past_caches = x.bytes() >= stream_from();
  for_rows(x, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return made;
}

Results run_rms_norm(const Tensor& x_, const MaybeTensor& residual, const MaybeTensor& weight, double eps,
                     double gain_offset, bool round_first, Statistics statistics) {
  check_constants(eps, gain_offset);
  const Rows x(x_);
  const Kernels& set = kernels();
  const Gain gain(set, weight, gain_offset, 1, x);
  Forward a = forward_of(x, gain, eps);
  a.round_first = round_first;
  return run_forward(a, set.rms_norm_forward[x.dtype], x, residual, statistics);
}

Results run_layer_norm(const Tensor& x_, const MaybeTensor& residual, const MaybeTensor& weight,
                       const MaybeTensor& bias, double eps, Statistics statistics) {
  check_constants(eps, 0);
  const Rows x(x_);
  const Kernels& set = kernels();
  const Gain gain(set, weight, 0, 1, x), shift(set, bias, 0, 0, x);
  Forward a = forward_of(x, gain, eps);
  a.bias = shift.data();
  return run_forward(a, set.layer_norm_forward[x.dtype], x, residual, statistics);
}

Tensor rms_norm(const Tensor& x, const MaybeTensor& weight, double eps, double gain_offset, bool round_first) {
  return run_rms_norm(x, {}, weight, eps, gain_offset, round_first, FORGET).y;
}
std::tuple<Tensor, Tensor> rms_norm_forward(
    const Tensor& x, const MaybeTensor& weight, double eps, double gain_offset, bool round_first) {
  const Results made = run_rms_norm(x, {}, weight, eps, gain_offset, round_first, KEEP);
  return {made.y, *made.scale};
}
std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, double eps, double gain_offset,
    bool round_first) {
  const Results made = run_rms_norm(x, residual, weight, eps, gain_offset, round_first, FORGET);
  return {made.y, *made.total};
}
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, double eps, double gain_offset,
    bool round_first) {
  const Results made = run_rms_norm(x, residual, weight, eps, gain_offset, round_first, KEEP);
  return {made.y, *made.total, *made.scale};
}

Tensor layer_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  return run_layer_norm(x, {}, weight, bias, eps, FORGET).y;
}
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  const Results made = run_layer_norm(x, {}, weight, bias, eps, KEEP);
  return {made.y, *made.mean, *made.scale};
}
std::tuple<Tensor, Tensor> add_layer_norm(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  const Results made = run_layer_norm(x, residual, weight, bias, eps, FORGET);
  return {made.y, *made.total};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  const Results made = run_layer_norm(x, residual, weight, bias, eps, KEEP);
  return {made.y, *made.total, *made.mean, *made.scale};
}

// Backward --------------------------------------------------------------------------------------------------------

// The sums for a gain's gradient, a row of `width` doubles per block. They are not changed when they are added up,
// because probes also receive them.
class Sums {
 public:
  Sums(bool wanted, int64_t blocks, int64_t width) : blocks_(wanted ? blocks : 0), width_(width) {
    if (!wanted) return;
    tensor_ = empty_blocks();
    values_ = static_cast<double*>(tensor_->mutable_data_ptr());
  }

  double* of_block(int64_t block) const {
    if (!values_) return nullptr;
    double* sums = values_ + block * width_;
    std::fill_n(sums, width_, 0.0);
    return sums;
  }

  // (blocks, width); 0 blocks if the sums are not needed.
  Tensor blocks() const { return tensor_ ? *tensor_ : empty_blocks(); }

  // Returns the sum of the blocks, in their order, rounded to `like`'s dtype; an empty tensor if there are no sums.
  Tensor total(const MaybeTensor& like) const {
    const int64_t size = tensor_ ? width_ : 0;
    const IntHeaderOnlyArrayRef shape(&size, 1);
    const ScalarType dtype = like ? like->scalar_type() : ScalarType::Float;
    if (!tensor_) return empty(shape, dtype);
    Tensor sums = empty(shape, dtype == ScalarType::Double ? dtype : ScalarType::Float);
    dtype == ScalarType::Double ? add_blocks(static_cast<double*>(sums.mutable_data_ptr()))
                                : add_blocks(static_cast<float*>(sums.mutable_data_ptr()));
    return sums.scalar_type() == dtype ? sums : torch::stable::to(sums, dtype);
  }

 private:
  Tensor empty_blocks() const {
    const std::array<int64_t, 2> shape{blocks_, width_};
    return empty(IntHeaderOnlyArrayRef(shape.data(), shape.size()), ScalarType::Double);
  }

  template <class To>
  void add_blocks(To* to) const {
    std::vector<double> added;
    if (blocks_ != 1) {
      added.assign(width_, 0.0);
      for (int64_t block = 0; block < blocks_; ++block)
        for (int64_t i = 0; i < width_; ++i) added[i] += values_[block * width_ + i];
    }
    const double* sums = blocks_ == 1 ? values_ : added.data();
    std::transform(sums, sums + width_, to, [](double sum) { return To(sum); });
  }

  int64_t blocks_, width_;
  MaybeTensor tensor_;
  double* values_ = nullptr;
};

// The results of a backward pass; the gradients of gain and bias are the totals of their block sums.
struct Gradients {
  Tensor dx;
  Sums gain, bias;
};

using Kernel = void (*)(const Backward&, int64_t, int64_t);

Gradients run_backward(
    Backward a, const Kernels& set, Kernel kernel, const Tensor& dy_, const MaybeTensor& dtotal_, const Rows& x,
    const Tensor& scale, const Tensor* mean, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
    double gain_offset, bool gains_wanted) {
  check_constants(eps, gain_offset);
  const Rows dy = x.like(dy_);
  const std::optional<Rows> dtotal = dtotal_ ? std::optional<Rows>(x.like(*dtotal_)) : std::nullopt;
  for (const Tensor* statistic : {&scale, mean})
    STD_TORCH_CHECK(!statistic || (statistic->numel() == x.count && statistic->scalar_type() == x.compute_type() &&
                                   statistic->is_contiguous() && statistic->is_cpu()),
                    "omninorm: the row statistics must be those of the forward pass");
  const Gain gain(set, weight, gain_offset, 1, x);
  Tensor dx = x.empty_like();

  a.width = x.width;
  a.eps = x.rounded_eps(eps);
  a.dy = dy.data();
  a.dtotal = dtotal ? dtotal->data() : nullptr;
  a.x = x.data();
  a.mean = mean ? mean->const_data_ptr() : nullptr;
  a.scale = scale.const_data_ptr();
  a.gain = gain.data();
  a.dx = dx.mutable_data_ptr();
  a.past_caches = x.bytes() >= stream_from();

  const int64_t rows = std::max(BLOCK_ROWS, (x.count + MOST_BLOCKS - 1) / MOST_BLOCKS);
  const int64_t blocks = (x.count + rows - 1) / rows;
  const Sums dgain(gains_wanted && weight, blocks, x.width), dbias(gains_wanted && bias, blocks, x.width);
  for_rows(x, rows, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Backward part = a;
      part.dgain = dgain.of_block(block);
      part.dbias = dbias.of_block(block);
      kernel(part, block * rows, std::min(x.count, (block + 1) * rows));
    }
  });
  return {dx, dgain, dbias};
}

Gradients run_rms_norm_backward(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x_, const Tensor& scale, const MaybeTensor& weight,
    double eps, double gain_offset, bool round_first, bool gains_wanted) {
  const Rows x(x_);
  Backward a{};
  a.round_first = round_first;
  const Kernels& set = kernels();
  const Kernel kernel = set.rms_norm_backward[x.dtype];
  return run_backward(a, set, kernel, dy, dtotal, x, scale, nullptr, weight, {}, eps, gain_offset, gains_wanted);
}

Gradients run_layer_norm_backward(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x_, const Tensor& mean, const Tensor& scale,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool gains_wanted) {
  const Rows x(x_);
  const Kernels& set = kernels();
  const Kernel kernel = set.layer_norm_backward[x.dtype];
  return run_backward(Backward{}, set, kernel, dy, dtotal, x, scale, &mean, weight, bias, eps, 0, gains_wanted);
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x, const Tensor& scale, const MaybeTensor& weight,
    double eps, double gain_offset, bool round_first, bool gains_wanted) {
  const Gradients made =
      run_rms_norm_backward(dy, dtotal, x, scale, weight, eps, gain_offset, round_first, gains_wanted);
  return {made.dx, made.gain.total(weight)};
}
std::tuple<Tensor, Tensor, Tensor> rms_norm_backward_blocks(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x, const Tensor& scale, const MaybeTensor& weight,
    double eps, double gain_offset, bool round_first, bool gains_wanted) {
  const Gradients made =
      run_rms_norm_backward(dy, dtotal, x, scale, weight, eps, gain_offset, round_first, gains_wanted);
  return {made.dx, made.gain.total(weight), made.gain.blocks()};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x, const Tensor& mean, const Tensor& scale,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool gains_wanted) {
  const Gradients made = run_layer_norm_backward(dy, dtotal, x, mean, scale, weight, bias, eps, gains_wanted);
  return {made.dx, made.gain.total(weight), made.bias.total(bias)};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward_blocks(
    const Tensor& dy, const MaybeTensor& dtotal, const Tensor& x, const Tensor& mean, const Tensor& scale,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, bool gains_wanted) {
  const Gradients made = run_layer_norm_backward(dy, dtotal, x, mean, scale, weight, bias, eps, gains_wanted);
  return {made.dx, made.gain.total(weight), made.bias.total(bias), made.gain.blocks()};
}

}  // namespace

// `scale` is r = 1/√(mean square + ε), one per row; `total` is x + residual; gradients that are not needed are empty.
// `blocks` are the float64 sums of dweight over blocks of rows, in order; dweight is their rounded sum.
STABLE_TORCH_LIBRARY(omninorm, m) {
#define RMS "Tensor? weight, float eps, float gain_offset=0.0, bool round_first=False"
#define LAYER "Tensor? weight, Tensor? bias, float eps"
#define RMS_BACKWARD "(Tensor dy, Tensor? dtotal, Tensor x, Tensor scale, " RMS ", bool gains_wanted=True)"
#define LAYER_BACKWARD \
  "(Tensor dy, Tensor? dtotal, Tensor x, Tensor mean, Tensor scale, " LAYER ", bool gains_wanted=True)"
  m.def("rms_norm(Tensor x, " RMS ") -> Tensor");
  m.def("rms_norm_forward(Tensor x, " RMS ") -> (Tensor y, Tensor scale)");
  m.def("rms_norm_autograd(Tensor x, " RMS ") -> (Tensor y, Tensor scale)");
  m.def("add_rms_norm(Tensor x, Tensor residual, " RMS ") -> (Tensor y, Tensor total)");
  m.def("add_rms_norm_forward(Tensor x, Tensor residual, " RMS ") -> (Tensor y, Tensor total, Tensor scale)");
  m.def("add_rms_norm_autograd(Tensor x, Tensor residual, " RMS ") -> (Tensor y, Tensor total, Tensor scale)");
  m.def("rms_norm_backward" RMS_BACKWARD " -> (Tensor dx, Tensor dweight)");
  m.def("rms_norm_backward_blocks" RMS_BACKWARD " -> (Tensor dx, Tensor dweight, Tensor blocks)");
  m.def("layer_norm(Tensor x, " LAYER ") -> Tensor");
  m.def("layer_norm_forward(Tensor x, " LAYER ") -> (Tensor y, Tensor mean, Tensor scale)");
  m.def("layer_norm_autograd(Tensor x, " LAYER ") -> (Tensor y, Tensor mean, Tensor scale)");
  m.def("add_layer_norm(Tensor x, Tensor residual, " LAYER ") -> (Tensor y, Tensor total)");
  m.def("add_layer_norm_forward(Tensor x, Tensor residual, " LAYER ")"
        " -> (Tensor y, Tensor total, Tensor mean, Tensor scale)");
  m.def("add_layer_norm_autograd(Tensor x, Tensor residual, " LAYER ")"
        " -> (Tensor y, Tensor total, Tensor mean, Tensor scale)");
  m.def("layer_norm_backward" LAYER_BACKWARD " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("layer_norm_backward_blocks" LAYER_BACKWARD " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor blocks)");
}

STABLE_TORCH_LIBRARY_IMPL(omninorm, CPU, m) {
#define IMPLEMENT(name) m.impl(#name, TORCH_BOX(&name))
  IMPLEMENT(rms_norm);
  IMPLEMENT(rms_norm_forward);
  IMPLEMENT(add_rms_norm);
  IMPLEMENT(add_rms_norm_forward);
  IMPLEMENT(rms_norm_backward);
  IMPLEMENT(rms_norm_backward_blocks);
  IMPLEMENT(layer_norm);
  IMPLEMENT(layer_norm_forward);
  IMPLEMENT(add_layer_norm);
  IMPLEMENT(add_layer_norm_forward);
  IMPLEMENT(layer_norm_backward);
  IMPLEMENT(layer_norm_backward_blocks);
  // The same operators under the names that exported programs call; see kernels/exported.py.
#define IMPLEMENT_AUTOGRAD(name) m.impl(#name "_autograd", TORCH_BOX(&name##_forward))
  IMPLEMENT_AUTOGRAD(rms_norm);
  IMPLEMENT_AUTOGRAD(add_rms_norm);
  IMPLEMENT_AUTOGRAD(layer_norm);
  IMPLEMENT_AUTOGRAD(add_layer_norm);
}
