// All kernels of the instruction set that argv[1] names, for the sanitizers: buffers end where their last element ends,
// starts are aligned or off by one element, rows hold every kind of number, and each option is on and off. Rows of
// ordinary numbers are compared with the formulas in double, loosely: the tests in Python are the exact ones.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using namespace omninorm;

constexpr double EPS = 1e-5;

// Dtypes: an element's size in bytes, and how many of its bits are mantissa and exponent.
struct Format {
  const char* name;
  int size, mantissa, exponent;
};
constexpr Format FORMATS[DTYPES] = {{"float64", 8, 52, 11}, {"float32", 4, 23, 8}, {"bfloat16", 2, 7, 8}, {"float16", 2, 10, 5}};

enum Kind { ORDINARY, ZERO, HUGE_NUMBERS, SUBNORMAL, WITH_INFINITY, WITH_NAN, KINDS };

enum Option {
  ADD = 1,
  ROUND_FIRST = 2,
  NO_GAIN_GRADIENTS = 4,
  NO_STATISTICS = 8,
  OFF_BY_ONE = 16,
  PAST_CACHES = 32,
  OPTIONS = 64
};

std::mt19937 generator(20);  // NOLINT: the same numbers in every run

double decoded(uint64_t bits, const Format& f) {
  const uint64_t mantissa = bits & ((uint64_t{1} << f.mantissa) - 1);
  const int exponent = int(bits >> f.mantissa) & ((1 << f.exponent) - 1);
  const int bias = (1 << (f.exponent - 1)) - 1;
  const double sign = (bits >> (f.mantissa + f.exponent)) & 1 ? -1 : 1;
  if (exponent == (1 << f.exponent) - 1) return mantissa ? std::nan("") : sign * INFINITY;
  const double significand = double(mantissa) + (exponent ? std::ldexp(1, f.mantissa) : 0);
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias - f.mantissa);
}

// A random number of this kind. The first of a row of WITH_INFINITY or WITH_NAN is one, the others are ordinary.
uint64_t element(Kind kind, bool first, const Format& f) {
  const uint64_t random = (uint64_t{generator()} << 32) | generator();
  const uint64_t mantissa = random & ((uint64_t{1} << f.mantissa) - 1);
  const uint64_t sign = (random >> 63) << (f.mantissa + f.exponent);
  const uint64_t all_ones = (uint64_t{1} << f.exponent) - 1;
  const uint64_t bias = all_ones / 2;
  switch (kind) {
    case ZERO: return sign;
    case HUGE_NUMBERS: return sign | (all_ones - 1) << f.mantissa | mantissa;
    case SUBNORMAL: return sign | mantissa;
    case WITH_INFINITY: if (first) return sign | all_ones << f.mantissa; break;
    case WITH_NAN: if (first) return sign | all_ones << f.mantissa | mantissa | 1; break;
    default: break;
  }
  return sign | (bias - (random >> 60) % 4) << f.mantissa | mantissa;  // 1/8 … 2
}

// `count` elements of `size` bytes, the last of which ends where the memory ends.
class Buffer {
 public:
  Buffer(int64_t count, int size, bool off_by_one)
      : start_(off_by_one ? size : 0), memory_(::operator new(size_t(start_ + count * size), ALIGNED)) {
    std::memset(memory_, 0xa5, size_t(start_ + count * size));
  }
  ~Buffer() { ::operator delete(memory_, ALIGNED); }
  Buffer(const Buffer&) = delete;
  void* data() { return static_cast<unsigned char*>(memory_) + start_; }

 private:
  static constexpr std::align_val_t ALIGNED{64};  // as PyTorch's tensors are
  int64_t start_;
  void* memory_;
};

// Rows of one dtype, with each element's value in double beside it.
class Tensor {
 public:
  Tensor(int64_t rows, int64_t width, const Format& f, bool off_by_one)
      : format_(f), width_(width), count_(rows * width), buffer_(count_, f.size, off_by_one) {}

  void fill(int64_t row, Kind kind) {
    for (int64_t i = 0; i < width_; ++i) {
      const uint64_t bits = element(kind, i == 0, format_);
      std::memcpy(bytes() + (row * width_ + i) * format_.size, &bits, size_t(format_.size));  // little-endian
    }
  }
  double at(int64_t row, int64_t i) {
    uint64_t bits = 0;
    std::memcpy(&bits, bytes() + (row * width_ + i) * format_.size, size_t(format_.size));
    return decoded(bits, format_);
  }
  std::vector<double> row(int64_t row) {
    std::vector<double> values;
    for (int64_t i = 0; i < width_; ++i) values.push_back(at(row, i));
    return values;
  }
  void* data() { return buffer_.data(); }

 private:
  unsigned char* bytes() { return static_cast<unsigned char*>(buffer_.data()); }

  Format format_;
  int64_t width_, count_;
  Buffer buffer_;
};

struct Case {
  const Kernels& set;
  Dtype dtype;
  bool centered;  // LayerNorm
  int64_t width, rows;
  Kind kind;      // of one row in three; the others are ordinary
  int options;

  bool on(Option option) const { return options & option; }
  bool special(int64_t row) const { return kind != ORDINARY && row % 3 == 1; }
  const Format& format() const { return FORMATS[dtype]; }
  const Format& compute() const { return FORMATS[dtype == FLOAT64 ? FLOAT64 : FLOAT32]; }
};

// `error` beyond `allowed` ends the program; NaN is beyond everything.
void check(const Case& c, const char* what, double error, double allowed) {
  if (error <= allowed) return;
  std::printf("%s: %s of %s %s is off by %g (allowed %g): width %ld, %ld rows, kind %d, options %d\n", c.set.name, what,
              c.format().name, c.centered ? "layer_norm" : "rms_norm", error, allowed, long(c.width), long(c.rows),
              c.kind, c.options);
  std::exit(1);
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum / double(values.size());
}

double mean_product(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum / double(a.size());
}

// x in place of x̂; the result is r.
double standardize(std::vector<double>& row, bool centered) {
  const double middle = centered ? mean(row) : 0;
  for (double& value : row) value -= middle;
  const double r = 1 / std::sqrt(mean_product(row, row) + EPS);
  for (double& value : row) value *= r;
  return r;
}

// All tensors of a call, forward and backward.
struct Call {
  Case c;
  Tensor x, residual, total, y, dy, dtotal, dx, gain, bias, row_mean, scale;
  Buffer prepared_gain, prepared_bias, dgain, dbias;

  explicit Call(const Case& of)
      : c(of), x(rows()), residual(rows()), total(rows()), y(rows()), dy(rows()), dtotal(rows()), dx(rows()),
        gain(numbers(1, c.width)), bias(numbers(1, c.width)), row_mean(numbers(1, c.rows)), scale(numbers(1, c.rows)),
        prepared_gain(c.width + GAIN_PADDING, c.compute().size, false),
        prepared_bias(c.width + GAIN_PADDING, c.compute().size, false), dgain(c.width, 8, false), dbias(c.width, 8, false) {
    for (int64_t row = 0; row < c.rows; ++row) {
      x.fill(row, c.special(row) ? c.kind : ORDINARY);
      for (Tensor* tensor : {&residual, &dy, &dtotal}) tensor->fill(row, ORDINARY);
    }
    for (Tensor* tensor : {&gain, &bias}) tensor->fill(0, ORDINARY);
    const Dtype compute = c.dtype == FLOAT64 ? FLOAT64 : FLOAT32;
    c.set.prepare_gain[c.dtype](compute, gain.data(), 0, prepared_gain.data(), c.width);
    c.set.prepare_gain[c.dtype](compute, bias.data(), 0, prepared_bias.data(), c.width);
    for (int64_t i = 0; i < c.width; ++i) dgain_at(i) = dbias_at(i) = 1;  // the sums are added to what is there
  }

  void run() {
    forward();
    check_forward();
    if (c.on(NO_STATISTICS)) return;
    backward();
    check_backward();
  }

 private:
  Tensor rows() const { return Tensor(c.rows, c.width, c.format(), c.on(OFF_BY_ONE)); }
  Tensor numbers(int64_t rows, int64_t width) const { return Tensor(rows, width, c.compute(), c.on(OFF_BY_ONE)); }
  double& dgain_at(int64_t i) { return static_cast<double*>(dgain.data())[i]; }
  double& dbias_at(int64_t i) { return static_cast<double*>(dbias.data())[i]; }
  // Rows of 4 and 8 bytes may also have them as they are.
  bool as_they_are() const { return c.format().size >= 4 && c.on(OFF_BY_ONE); }
  void* gain_data() { return as_they_are() ? gain.data() : prepared_gain.data(); }
  void* bias_data() { return as_they_are() ? bias.data() : prepared_bias.data(); }
  std::vector<double> normalized(int64_t row) { return (c.on(ADD) ? total : x).row(row); }

  void forward() {
    Forward a{};
    a.width = c.width;
    a.eps = EPS;
    a.round_first = c.on(ROUND_FIRST);
    a.x = x.data();
    a.residual = c.on(ADD) ? residual.data() : nullptr;
    a.total = c.on(ADD) ? total.data() : nullptr;
    a.gain = gain_data();
    a.bias = c.centered ? bias_data() : nullptr;
    a.past_caches = c.on(PAST_CACHES);
    a.y = y.data();
    a.mean = c.centered && !c.on(NO_STATISTICS) ? row_mean.data() : nullptr;
    a.scale = c.on(NO_STATISTICS) ? nullptr : scale.data();
    (c.centered ? c.set.layer_norm_forward : c.set.rms_norm_forward)[c.dtype](a, 0, c.rows);
  }

  void backward() {
    Backward a{};
    a.width = c.width;
    a.eps = EPS;
    a.round_first = c.on(ROUND_FIRST);
    a.dy = dy.data();
    a.dtotal = c.on(ADD) ? dtotal.data() : nullptr;
    a.x = (c.on(ADD) ? total : x).data();
    a.mean = c.centered ? row_mean.data() : nullptr;
    a.scale = scale.data();
    a.gain = gain_data();
    a.dx = dx.data();
    a.past_caches = c.on(PAST_CACHES);
    a.dgain = c.on(NO_GAIN_GRADIENTS) ? nullptr : static_cast<double*>(dgain.data());
    a.dbias = c.centered && !c.on(NO_GAIN_GRADIENTS) ? static_cast<double*>(dbias.data()) : nullptr;
    (c.centered ? c.set.layer_norm_backward : c.set.rms_norm_backward)[c.dtype](a, 0, c.rows);
  }

  // The two roundings of the dtype that a result may have, and many of the compute type.
  double allowed(double magnitude) const {
    return magnitude * (4 * std::ldexp(1, -c.format().mantissa) + 64 * std::ldexp(1, -c.compute().mantissa));
  }

  void check_forward() {
    for (int64_t row = 0; row < c.rows; ++row) {
      if (c.special(row)) continue;
      std::vector<double> normed = normalized(row);
      if (c.on(ADD))
        for (int64_t i = 0; i < c.width; ++i)
          check(c, "total", std::fabs(normed[i] - (x.at(row, i) + residual.at(row, i))), allowed(4));
      const double r = standardize(normed, c.centered);
      if (!c.on(NO_STATISTICS)) check(c, "scale", std::fabs(scale.at(0, row) / r - 1), c.dtype == FLOAT64 ? 1e-9 : 1e-3);
      for (int64_t i = 0; i < c.width; ++i) {
        const double expected = normed[i] * gain.at(0, i) + (c.centered ? bias.at(0, i) : 0);
        check(c, "y", std::fabs(y.at(row, i) - expected), allowed(2 * std::fabs(normed[i]) + r + 4));
      }
    }
  }

  void check_backward() {
    std::vector<double> sum(c.width, 1), sum_of_dy(c.width, 1);
    bool defined = true;
    for (int64_t row = 0; row < c.rows; ++row) {
      std::vector<double> normed = normalized(row);
      const double r = standardize(normed, c.centered);
      std::vector<double> g = dy.row(row);
      for (int64_t i = 0; i < c.width; ++i) {
        sum[i] += g[i] * normed[i];
        sum_of_dy[i] += g[i];
        g[i] *= gain.at(0, i);
      }
      defined = defined && !c.special(row);
      if (c.special(row)) continue;
      const double mean_g = c.centered ? mean(g) : 0, projection = mean_product(g, normed);
      for (int64_t i = 0; i < c.width; ++i) {
        const double largest = 4 + r * (std::fabs(g[i]) + std::fabs(mean_g) + std::fabs(normed[i]) * 8 + r);
        const double expected = r * (g[i] - mean_g - normed[i] * projection) + (c.on(ADD) ? dtotal.at(row, i) : 0);
        check(c, "dx", std::fabs(dx.at(row, i) - expected), allowed(largest));
      }
    }
    if (c.on(NO_GAIN_GRADIENTS)) return;
    for (int64_t i = 0; i < c.width; ++i) {
      if (defined) check(c, "dgain", std::fabs(dgain_at(i) - sum[i]), allowed(2.0 * double(c.rows)));
      if (c.centered) check(c, "dbias", std::fabs(dbias_at(i) - sum_of_dy[i]), allowed(2.0 * double(c.rows)));
    }
  }
};

// γ + offset from every dtype, for rows of float32 and float64; those of 16 bits show in what norms compute.
void check_gains(const Kernels& set, Dtype dtype, int64_t width, bool off_by_one) {
  for (const Dtype rows : {FLOAT32, FLOAT64}) {
    const Case c{set, dtype, false, width, 1, ORDINARY, off_by_one ? OFF_BY_ONE : 0};
    Tensor gain(1, width, FORMATS[dtype], off_by_one), prepared(1, width + GAIN_PADDING, FORMATS[rows], false);
    gain.fill(0, ORDINARY);
    set.prepare_gain[rows](dtype, gain.data(), 0.5, prepared.data(), width);
    for (int64_t i = 0; i < width; ++i)
      check(c, "a prepared gain", std::fabs(prepared.at(0, i) - (gain.at(0, i) + 0.5)), rows == FLOAT64 ? 1e-15 : 1e-6);
  }
  Tensor gain(1, width, FORMATS[dtype], off_by_one);
  gain.fill(0, ORDINARY);
  Buffer prepared(width + GAIN_PADDING, 4, false);
  for (const Dtype rows : {BFLOAT16, FLOAT16}) set.prepare_gain[rows](dtype, gain.data(), 0.5, prepared.data(), width);
}

const Kernels* find(const char* name) {
  for (const Kernels* const* set = runnable_sets(); *set; ++set)
    if (std::strcmp((*set)->name, name) == 0) return *set;
  return nullptr;
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* set = count == 2 ? find(arguments[1]) : nullptr;
  if (!set) {
    std::printf("usage: sanitize SET, where SET is an instruction set that was built and that this machine has\n");
    return 2;
  }
  std::vector<int64_t> widths;
  for (int64_t width = 1; width <= 70; ++width) widths.push_back(width);
  for (int64_t block : {128, 256, 512})  // what a set's lanes sum until they move to a wider total
    for (int64_t width : {block - 1, block, block + 1, block + 37}) widths.push_back(width);
  long calls = 0;
  for (int dtype = 0; dtype < DTYPES; ++dtype) {
    for (int64_t width : widths) {
      check_gains(*set, Dtype(dtype), width, false);
      check_gains(*set, Dtype(dtype), width, true);
      for (bool centered : {false, true})
        for (int64_t rows = 1; rows <= 9; ++rows)
          for (int options = 0; options < OPTIONS; ++options) {
            if (generator() % (width > 70 ? 12 : 4)) continue;  // some calls of each kind are enough
            Call({*set, Dtype(dtype), centered, width, rows, Kind(generator() % KINDS), options}).run();
            ++calls;
          }
    }
  }
  std::printf("%s: %ld calls are clean and right\n", set->name, calls);
  return 0;
}
