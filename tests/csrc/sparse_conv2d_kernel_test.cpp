// The convolution kernels of one instruction set against loops in double: odd shapes, both memory formats, all dtypes.
#include "sparse_conv2d.h"

#include <algorithm>
#include <cmath>

#include "kernel_test.h"

namespace sparsekern {
namespace {

struct Values { // a batch of images, or a weight: (outer, channels, rows, columns)
  int64_t outer, channels, rows, columns;
  bool channels_last;
  std::vector<double> at; // in the order of the shape
  int64_t size() const { return outer * channels * rows * columns; }
  int64_t index(int64_t b, int64_t c, int64_t h, int64_t w) const { return ((b * channels + c) * rows + h) * columns + w; }
};

template <class T> Values draw(int64_t outer, int64_t c, int64_t h, int64_t w, bool channels_last, double active,
                               std::mt19937& random) {
  Values v{outer, c, h, w, channels_last, std::vector<double>(size_t(outer * c * h * w))};
  std::normal_distribution<double> normal;
  std::bernoulli_distribution keep(active);
  for (double& value : v.at) {
    T stored{};
    from_acc(acc_t<T>(normal(random)), stored);
    value = keep(random) ? double(to_acc(stored)) : 0.0;
  }
  return v;
}

// Where element i of the shape lies in memory.
int64_t place(const Values& v, int64_t i) {
  if (!v.channels_last) return i;
  const int64_t pixels = v.rows * v.columns, pixel = i % pixels, c = i / pixels % v.channels;
  return (i / pixels / v.channels * pixels + pixel) * v.channels + c;
}

// In exactly as many bytes as there are elements, so that a sanitizer sees a read or write beyond them.
template <class T> std::vector<T> stored(const Values& v) {
  std::vector<T> out(size_t(v.size()));
  for (int64_t i = 0; i < v.size(); i++) from_acc(acc_t<T>(v.at[size_t(i)]), out[size_t(place(v, i))]);
  return out;
}

// The sums and the sums of absolute products, whose rounding bounds the error.
struct Wanted {
  std::vector<double> sum, absolute;
  explicit Wanted(int64_t n) : sum(size_t(n)), absolute(size_t(n)) {}
  void add(int64_t i, double product) { sum[size_t(i)] += product, absolute[size_t(i)] += std::abs(product); }
};

struct Reference {
  Wanted y, grad_x, grad_weight;
  Reference(const Conv2d& conv, const Values& x, const Values& weight, const Values& grad_y)
      : y(grad_y.size()), grad_x(x.size()), grad_weight(weight.size()) {
    for (int64_t b = 0; b < conv.B; b++)
      for (int64_t o = 0; o < conv.O; o++)
        for (int64_t oh = 0; oh < conv.OH; oh++)
          for (int64_t ow = 0; ow < conv.OW; ow++) add_output(conv, x, weight, grad_y, b, o, oh, ow);
  }
  void add_output(const Conv2d& conv, const Values& x, const Values& weight, const Values& grad_y, int64_t b, int64_t o,
                  int64_t oh, int64_t ow) {
    const int64_t out = grad_y.index(b, o, oh, ow);
    for (int64_t c = 0; c < conv.C; c++)
      for (int64_t kh = 0; kh < conv.KH; kh++)
        for (int64_t kw = 0; kw < conv.KW; kw++) {
          const int64_t h = oh * conv.SH - conv.PH + kh, w = ow * conv.SW - conv.PW + kw;
          if (h < 0 || h >= conv.H || w < 0 || w >= conv.W) continue;
          const int64_t in = x.index(b, c, h, w), tap = weight.index(o, c, kh, kw);
          const double g = grad_y.at[size_t(out)];
          y.add(out, x.at[size_t(in)] * weight.at[size_t(tap)]);
          grad_x.add(in, g * weight.at[size_t(tap)]);
          grad_weight.add(tap, g * x.at[size_t(in)]);
        }
  }
};

template <class T> void compare(const char* name, const Conv2d& conv, const Values& shape, const std::vector<T>& got,
                                const Wanted& wanted, const Values* mask = nullptr, const Values* bias = nullptr) {
  // Half a unit in the last place of the storage, and some of the accumulator's for each of the absolute products.
  const double store = sizeof(T) == 8 ? 0x1p-52 : sizeof(T) == 4 ? 0x1p-23 : conv.dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  const double least = conv.dtype == DType::f16 ? 0x1p-25 : 0; // half of the smallest number
  const double sums = sizeof(acc_t<T>) == 8 ? 0x1p-48 : 0x1p-19;
  for (int64_t i = 0; i < shape.size(); i++) {
    double value = wanted.sum[size_t(i)];
    if (bias != nullptr) value += bias->at[size_t(i / (shape.rows * shape.columns) % shape.channels)];
    if (mask != nullptr && mask->at[size_t(i)] == 0) value = 0;
    const double found = double(to_acc(got[size_t(place(shape, i))]));
    const double bound = store * std::abs(value) + sums * (wanted.absolute[size_t(i)] + std::abs(value)) + least;
    expect(std::abs(found - value) <= bound,
           "%s: dtype %d, B %lld, C %lld, O %lld, kernel %lldx%lld, stride %lldx%lld, %s: "
           "element %lld is %.9g, wanted %.9g",
           name, int(conv.dtype), (long long)conv.B, (long long)conv.C, (long long)conv.O, (long long)conv.KH,
           (long long)conv.KW,
           (long long)conv.SH, (long long)conv.SW, shape.channels_last ? "channels last" : "contiguous", (long long)i,
           found, value);
  }
}

// Room for as many bytes, 64-byte aligned.
struct Aligned {
  std::vector<char> bytes;
  char* data;
  explicit Aligned(size_t size) : bytes(size + 64) {
    data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
};

struct Packed : Aligned {
  Packed(const Conv2d& conv, bool transposed, const void* weight, bool channels_last)
      : Aligned(SPARSEKERN_SELECT(sparse_conv2d).packed_bytes(conv, transposed)) {
    const SparseConv2dKernels& kernels = SPARSEKERN_SELECT(sparse_conv2d);
    const int64_t panels = kernels.panels(conv, transposed), half = panels / 2; // as two threads would
    kernels.pack(conv, transposed, weight, channels_last, data, 0, half);
    kernels.pack(conv, transposed, weight, channels_last, data, half, panels - half);
  }
};

template <class T> void check_case(const Conv2d& conv, double active, double active_grad, std::mt19937& random) {
  const SparseConv2dKernels& kernels = SPARSEKERN_SELECT(sparse_conv2d);
  const bool x_last = random() % 2, weight_last = random() % 2, grad_last = random() % 2;
  const Values x = draw<T>(conv.B, conv.C, conv.H, conv.W, x_last, active, random);
  const Values weight = draw<T>(conv.O, conv.C, conv.KH, conv.KW, weight_last, 1, random);
  const Values grad_y = draw<T>(conv.B, conv.O, conv.OH, conv.OW, grad_last, active_grad, random);
  const Values bias = draw<T>(1, conv.O, 1, 1, false, 1, random);
  const Reference wanted(conv, x, weight, grad_y);
  std::vector<T> x_data = stored<T>(x), weight_data = stored<T>(weight), grad_data = stored<T>(grad_y);
  const std::vector<T> bias_data = stored<T>(bias);
  const Images x_images{x_data.data(), x_last}, grad_images{grad_data.data(), grad_last};

  int64_t non_zeros = 0;
  for (const double value : x.at) non_zeros += value != 0;
  expect(kernels.count(conv.dtype, x_data.data(), x.size()) == non_zeros, "count of dtype %d", int(conv.dtype));

  Packed packed(conv, false, weight_data.data(), weight_last), turned(conv, true, weight_data.data(), weight_last);
  Values y_shape = grad_y;
  y_shape.channels_last = x_last;
  std::vector<T> y(size_t(grad_y.size())), grad_x(size_t(x.size())), grad_weight(size_t(weight.size()));
  const int64_t panels = kernels.panels(conv, false), half = conv.B / 2;
  for (const Part part : {Part{0, half, 0, panels}, Part{half, conv.B - half, 0, panels / 2},
                          Part{half, conv.B - half, panels / 2, panels - panels / 2}})
    kernels.forward(conv, x_images, packed.data, bias_data.data(), {y.data(), x_last}, part);
  compare("forward", conv, y_shape, y, wanted.y, nullptr, &bias);
  kernels.forward(conv, x_images, packed.data, nullptr, {y.data(), x_last}, {0, conv.B, 0, panels});
  compare("forward without bias", conv, y_shape, y, wanted.y);

  const Part whole{0, conv.B, 0, kernels.panels(conv, true)};
  kernels.grad_input(conv, grad_images, turned.data, nullptr, {grad_x.data(), x_last}, whole);
  compare("grad_input", conv, x, grad_x, wanted.grad_x);
  kernels.grad_input(conv, grad_images, turned.data, x_data.data(), {grad_x.data(), x_last}, whole);
  compare("grad_input of a mask", conv, x, grad_x, wanted.grad_x, &x);
  const ChannelPart halves[] = {{0, half, 0, conv.C}, {half, conv.B - half, 0, conv.C}};
  for (const ChannelPart part : halves)
    kernels.gradients(conv, false, grad_images, x_images, packed.data, nullptr, grad_x.data(), part);
  compare("grad_input at non-zeros", conv, x, grad_x, wanted.grad_x, &x);

  const Images weight_images{grad_weight.data(), weight_last};
  const auto of_weight = [&](const char* what, bool by_grad, const void* weights, void* values) {
    std::fill(grad_weight.begin(), grad_weight.end(), T{});
    const size_t bytes = kernels.packed_bytes(conv, by_grad);
    const Aligned sums(2 * bytes);
    const int64_t channels = by_grad ? conv.O : conv.C, third = channels / 3;
    for (const ChannelPart part : halves)
      for (const auto [first, n] : {std::pair{int64_t(0), third}, std::pair{third, channels - third}})
        kernels.gradients(conv, by_grad, grad_images, x_images, weights, sums.data + (part.first_sample > 0 ? bytes : 0), values,
                          {part.first_sample, part.samples, first, n});
    const int64_t stretches = half > 0 ? 2 : 1; // else the first half's sums were cleared by the second's
    kernels.write_grad_weight(conv, by_grad, sums.data, stretches, weight_images, 0, third);
    kernels.write_grad_weight(conv, by_grad, sums.data, stretches, weight_images, third, channels - third);
    compare(what, conv, weight, grad_weight, wanted.grad_weight);
  };
  of_weight("grad_weight by x", false, nullptr, nullptr);
  of_weight("grad_weight by grad_y", true, nullptr, nullptr);
  std::fill(grad_x.begin(), grad_x.end(), T{});
  of_weight("grad_weight, with the input's", false, packed.data, grad_x.data());
  compare("grad_input, with the weight's", conv, x, grad_x, wanted.grad_x, &x);
}

template <class T> void check_dtype(DType dtype, std::mt19937& random) {
  const auto one_of = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  for (int i = 0; i < 60; i++) {
    const int64_t KH = one_of({1, 2, 3, 5, 7}), KW = i % 3 ? KH : one_of({1, 2, 4, 5, 7, 11});
    const int64_t PH = one_of({0, 0, 1, 3}), PW = one_of({0, 0, 1, 3});
    const int64_t SH = one_of({1, 1, 2, 3}), SW = one_of({1, 1, 2, 3});
    const int64_t H = std::max<int64_t>(1, KH - 2 * PH) + one_of({0, 1, 4, 9});
    const int64_t W = std::max<int64_t>(1, KW - 2 * PW) + one_of({0, 2, 7, 17});
    const Conv2d conv{one_of({0, 1, 2, 3}), one_of({1, 2, 3, 16, 17, 33}), H, W, one_of({1, 3, 15, 16, 32, 35}), KH, KW,
                      (H + 2 * PH - KH) / SH + 1, (W + 2 * PW - KW) / SW + 1, SH, SW, PH, PW, dtype};
    const double actives[] = {0, 0.05, 0.3, 1};
    check_case<T>(conv, actives[random() % 4], actives[random() % 4], random);
  }
  // More channels than a pass takes at once, and more samples than are taken together.
  check_case<T>({1, 300, 4, 5, 40, 3, 3, 2, 3, 1, 1, 0, 0, dtype}, 0.1, 0.1, random);
  check_case<T>({11, 3, 8, 8, 16, 5, 5, 4, 4, 1, 1, 0, 0, dtype}, 0.3, 0.1, random);
}

// Equal bytes have one fingerprint wherever they lie; any bit that changes changes it, and so do signs of numbers that a lane
// takes one after the other.
void check_fingerprint(std::mt19937& random) {
  const SparseConv2dKernels& kernels = SPARSEKERN_SELECT(sparse_conv2d);
  for (const size_t bytes : {0, 1, 7, 64, 1000, 1023, 1024, 1025, 2048, 5003}) {
    std::vector<char> data(bytes + 1), moved(bytes + 1);
    for (char& c : data) c = char(random());
    const Fingerprint before = kernels.fingerprint(data.data(), bytes);
    std::copy_n(data.begin(), bytes, moved.begin() + 1);
    expect(kernels.fingerprint(moved.data() + 1, bytes) == before, "fingerprint of %zu bytes elsewhere", bytes);
    for (size_t i = 0; i < bytes * 8; i += 1 + random() % 7) {
      data[i / 8] ^= char(1 << i % 8);
      expect(kernels.fingerprint(data.data(), bytes) != before, "fingerprint of %zu bytes, bit %zu", bytes, i);
      data[i / 8] ^= char(1 << i % 8);
    }
    for (size_t i = 3; i + 1024 < bytes; i += 4) {
      data[i] ^= char(0x80), data[i + 1024] ^= char(0x80);
      expect(kernels.fingerprint(data.data(), bytes) != before, "fingerprint of %zu bytes, signs at %zu", bytes, i);
      data[i] ^= char(0x80), data[i + 1024] ^= char(0x80);
    }
  }
}

} // namespace
} // namespace sparsekern

int main(int argc, char** argv) {
  using namespace sparsekern;
  if (!choose_isa(argc, argv)) return 77;
  std::mt19937 random(0);
  check_fingerprint(random);
  check_dtype<float>(DType::f32, random);
  check_dtype<double>(DType::f64, random);
  check_dtype<bf16>(DType::bf16, random);
  check_dtype<f16>(DType::f16, random);
  return result();
}
