// The sparse_linear kernels of one instruction set against plain double loops over a dense weight.
//   sparse_linear_kernel_test ISA      exit 77: not available on this processor
#include "sparse_linear.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace sparsekern;

namespace {

int failures = 0;

double read(DType dtype, const void* data, size_t i) {
  if (dtype == DType::f32) return ((const float*)data)[i];
  if (dtype == DType::f64) return ((const double*)data)[i];
  const uint16_t bits = ((const uint16_t*)data)[i];
  if (dtype == DType::bf16) {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

// Multiples of 1/8 up to 2 are exact in every dtype.
void write(DType dtype, void* data, size_t i, double value) {
  if (dtype == DType::f32) ((float*)data)[i] = float(value);
  else if (dtype == DType::f64) ((double*)data)[i] = value;
  else if (dtype == DType::bf16) {
    const float f = float(value);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    ((uint16_t*)data)[i] = uint16_t(u >> 16);
  } else {
    int exponent = 0;
    const double mantissa = std::frexp(std::fabs(value), &exponent); // in [0.5, 1)
    const uint16_t bits = value == 0 ? 0 : uint16_t((exponent + 14) << 10 | (int(mantissa * 2048) & 1023));
    ((uint16_t*)data)[i] = uint16_t(bits | (value < 0 ? 0x8000 : 0));
  }
}

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Exactly n elements, so that AddressSanitizer sees a read or write beyond them; NaN until written.
struct Array {
  DType dtype;
  size_t n;
  std::vector<char> bytes;
  Array(DType dtype_, size_t n_) : dtype(dtype_), n(n_), bytes(n * size_of(dtype), char(0xff)) {}
  void* data() { return bytes.data(); }
  double at(size_t i) const { return read(dtype, bytes.data(), i); }
  void set(size_t i, double v) { write(dtype, bytes.data(), i, v); }
};

struct Case {
  DType dtype;
  int64_t B, I, O, G;
  double density, active;
  bool bits;
};

struct Layer {
  std::vector<int32_t> ccol{0}, rows;
  std::vector<uint64_t> bits;
  Layer(const Case& c, std::mt19937& random) {
    const int64_t words = (c.O + 63) / 64;
    bits.resize(size_t(c.I * words));
    for (int64_t i = 0; i < c.I; i++) {
      for (int64_t g = 0; g * c.G < c.O; g++)
        if (double(random() % 1000) < 1000 * c.density) {
          rows.push_back(int32_t(g));
          if (c.G == 1) bits[size_t(i * words + g / 64)] |= uint64_t(1) << (g % 64);
        }
      ccol.push_back(int32_t(rows.size()));
    }
  }
};

// The lists of LinearPlan; entries of a cell are in no particular order of their counts here.
struct Plan {
  std::vector<int32_t> cells, starts, output, input, source;
  Plan(const Layer& layer, int64_t I, int64_t O) {
    for (int64_t o = 0; o < O; o += kPlanOutputs)
      for (int64_t i = 0; i < I; i += kPlanInputs) {
        cells.push_back(int32_t(output.size()));
        for (int64_t k = o; k < O && k < o + kPlanOutputs; k++) {
          const size_t before = source.size();
          for (int64_t n = i; n < I && n < i + kPlanInputs; n++)
            for (int32_t b = layer.ccol[size_t(n)]; b < layer.ccol[size_t(n + 1)]; b++)
              if (layer.rows[size_t(b)] == k) input.push_back(int32_t(n - i)), source.push_back(b);
          if (source.size() > before) starts.push_back(int32_t(before)), output.push_back(int32_t(k - o));
        }
      }
    cells.push_back(int32_t(output.size())), starts.push_back(int32_t(source.size()));
  }
};

// The lists of LinearGroups.
struct Groups {
  std::vector<int32_t> starts, input, source;
  Groups(const Layer& layer, int64_t I, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) {
      starts.push_back(int32_t(source.size()));
      for (int64_t i = 0; i < I; i++)
        for (int32_t b = layer.ccol[size_t(i)]; b < layer.ccol[size_t(i + 1)]; b++)
          if (layer.rows[size_t(b)] == g) input.push_back(int32_t(i)), source.push_back(b);
    }
    starts.push_back(int32_t(source.size()));
  }
};

void fill(Array& a, double active, std::mt19937& random) {
  for (size_t i = 0; i < a.n; i++) {
    const bool zero = double(random() % 1000) >= 1000 * active;
    a.set(i, zero ? 0 : (double(random() % 16) - 8 + 0.5) / 4); // never 0
  }
}

// Sums are exact where they are taken in float; narrowing rounds once.
void compare(const Case& c, const char* what, const Array& got, const std::vector<double>& wanted) {
  const double rounding = c.dtype == DType::bf16 ? 1 / 256. : c.dtype == DType::f16 ? 1 / 2048. : 0;
  for (size_t i = 0; i < got.n; i++) {
    if (std::fabs(got.at(i) - wanted[i]) <= rounding * std::fabs(wanted[i])) continue; // false for NaN
    std::printf("%s: dtype %d B %d I %d O %d G %d density %g active %g bits %d: at %zu got %g, wanted %g\n", what,
                int(c.dtype), int(c.B), int(c.I), int(c.O), int(c.G), c.density, c.active, c.bits, i, got.at(i),
                wanted[i]);
    failures++;
    return;
  }
}

void check(const SparseLinearKernels& kernels, const Case& c, std::mt19937& random) {
  const int64_t B = c.B, I = c.I, O = c.O, G = c.G;
  const Layer layer(c, random);
  const size_t blocks = layer.rows.size();
  const LinearSupport w{I, O, G, layer.ccol.data(), layer.rows.data(), c.bits ? layer.bits.data() : nullptr};
  Array x(c.dtype, size_t(B * I)), grad_y(c.dtype, size_t(B * O)), weight(c.dtype, blocks * size_t(G));
  Array bias(c.dtype, size_t(O));
  fill(x, c.active, random), fill(grad_y, c.active, random), fill(weight, 1, random), fill(bias, 1, random);

  std::vector<double> dense(size_t(I * O));
  for (int64_t i = 0; i < I; i++)
    for (int64_t b = layer.ccol[i]; b < layer.ccol[i + 1]; b++)
      for (int64_t g = 0, o = layer.rows[b] * G; g < G && o < O; g++, o++) dense[i * O + o] = weight.at(b * G + g);
  std::vector<double> y(size_t(B * O)), grad_x(size_t(B * I)), at_nonzeros(size_t(B * I)), grad(blocks * size_t(G));
  for (int64_t s = 0; s < B; s++) {
    for (int64_t o = 0; o < O; o++) y[s * O + o] = bias.at(o);
    for (int64_t i = 0; i < I; i++) {
      for (int64_t o = 0; o < O; o++) {
        y[s * O + o] += x.at(s * I + i) * dense[i * O + o];
        grad_x[s * I + i] += grad_y.at(s * O + o) * dense[i * O + o];
      }
      if (x.at(s * I + i) != 0) at_nonzeros[s * I + i] = grad_x[s * I + i];
      for (int64_t b = layer.ccol[i]; b < layer.ccol[i + 1]; b++)
        for (int64_t g = 0, o = layer.rows[b] * G; g < G && o < O; g++, o++)
          grad[b * G + g] += x.at(s * I + i) * grad_y.at(s * O + o);
    }
  }

  const int64_t row = B / 2, output = O > kLinearPanel ? kLinearPanel : O, input = I > kLinearPanel ? kLinearPanel : I;
  Array got(c.dtype, size_t(B * O));
  kernels.forward(c.dtype, w, x.data(), weight.data(), bias.data(), got.data(), 0, row);
  kernels.forward(c.dtype, w, x.data(), weight.data(), bias.data(), got.data(), row, B);
  compare(c, "forward", got, y);
  for (const bool all : {false, true}) {
    got = Array(c.dtype, size_t(B * O));
    for (int part = 0; part < 2 && B > 0; part++)
      for (int side = 0; side < 2; side++)
        kernels.forward_panels(c.dtype, w, x.data(), weight.data(), bias.data(), all, got.data(), part ? row : 0,
                               part ? B : row, side ? output : 0, side ? O : output);
    compare(c, all ? "forward_panels of all" : "forward_panels", got, y);
  }

  if (G == 1 && c.dtype != DType::f64) {
    const Plan lists(layer, I, O);
    const LinearPlan plan{I, O, lists.cells.data(), lists.starts.data(), lists.output.data(), lists.input.data(),
                          lists.source.data()};
    std::vector<float> ordered(blocks);
    kernels.order_weights(c.dtype, plan, weight.data(), ordered.data(), 0, int64_t(blocks) / 2);
    kernels.order_weights(c.dtype, plan, weight.data(), ordered.data(), int64_t(blocks) / 2, int64_t(blocks));
    got = Array(c.dtype, size_t(B * O));
    kernels.forward_lanes(c.dtype, plan, x.data(), ordered.data(), bias.data(), got.data(), 0, row, 0, O);
    kernels.forward_lanes(c.dtype, plan, x.data(), ordered.data(), bias.data(), got.data(), row, B, 0, O);
    compare(c, "forward_lanes", got, y);
  }

  const int64_t count = (O + G - 1) / G; // of groups
  const Groups lists(layer, I, count);
  const LinearGroups groups{lists.starts.data(), lists.input.data(), lists.source.data()};
  const bool by_groups = G % 16 == 0 && B > 0;
  if (by_groups) {
    got = Array(c.dtype, size_t(B * O));
    for (int part = 0; part < 2; part++)
      for (int side = 0; side < 2; side++)
        kernels.forward_groups(c.dtype, w, groups, x.data(), weight.data(), bias.data(), got.data(), part ? row : 0,
                               part ? B : row, side ? count / 2 : 0, side ? count : count / 2);
    compare(c, "forward_groups", got, y);
  }

  const bool pairs = c.dtype == DType::bf16 && kernels.pairs() && (c.bits || G % 16 == 0 || c.density == 1);
  got = Array(c.dtype, size_t(B * O));
  for (int part = 0; part < 2 && B > 0 && pairs; part++)
    for (int side = 0; side < 2; side++)
      kernels.forward_pairs(w, x.data(), weight.data(), bias.data(), got.data(), part ? row : 0, part ? B : row,
                            side ? output : 0, side ? O : output);
  if (pairs) compare(c, "forward_pairs", got, y);

  for (const bool only : {false, true}) {
    const std::vector<double>& wanted = only ? at_nonzeros : grad_x;
    got = Array(c.dtype, size_t(B * I));
    kernels.grad_input(c.dtype, w, grad_y.data(), x.data(), weight.data(), got.data(), only, 0, row);
    kernels.grad_input(c.dtype, w, grad_y.data(), x.data(), weight.data(), got.data(), only, row, B);
    compare(c, "grad_input", got, wanted);
    for (const bool all : {false, true}) {
      got = Array(c.dtype, size_t(B * I));
      for (int side = 0; side < 2 && B > 0; side++)
        kernels.grad_input_panels(c.dtype, w, grad_y.data(), x.data(), weight.data(), got.data(), only, all, 0, B,
                                  side ? input : 0, side ? I : input);
      compare(c, all ? "grad_input_panels of all" : "grad_input_panels", got, wanted);
    }
    got = Array(c.dtype, size_t(B * I));
    for (int part = 0; part < 2 && by_groups; part++)
      for (int side = 0; side < 2; side++)
        kernels.grad_input_groups(c.dtype, w, groups, grad_y.data(), x.data(), weight.data(), got.data(), only,
                                  part ? row : 0, part ? B : row, side ? I / 3 : 0, side ? I : I / 3);
    if (by_groups) compare(c, "grad_input_groups", got, wanted);
    got = Array(c.dtype, size_t(B * I));
    for (int side = 0; side < 2 && B > 0 && pairs; side++)
      kernels.grad_input_pairs(w, grad_y.data(), x.data(), weight.data(), got.data(), only, 0, B, side ? input : 0,
                               side ? I : input);
    if (pairs) compare(c, "grad_input_pairs", got, wanted);
  }

  got = Array(c.dtype, blocks * size_t(G));
  kernels.grad_weight(c.dtype, w, grad_y.data(), x.data(), got.data(), B, I / 3, I);
  kernels.grad_weight(c.dtype, w, grad_y.data(), x.data(), got.data(), B, 0, I / 3);
  compare(c, "grad_weight", got, grad);
  const size_t bytes = kernels.tiles_bytes(c.dtype, B, O);
  void* memory = scratch(7, bytes);
  if (bytes > 0) std::memset(memory, 0xff, bytes);
  kernels.tile_rows(c.dtype, grad_y.data(), O, memory, 0, row);
  kernels.tile_rows(c.dtype, grad_y.data(), O, memory, row, B);
  for (const bool all : {false, true}) {
    const bool by_bits = c.bits && isa() == Isa::avx512 && c.dtype != DType::f64;
    if (all && (B == 0 || !(G % 16 == 0 || by_bits))) continue;
    got = Array(c.dtype, blocks * size_t(G));
    kernels.grad_weight_panels(c.dtype, w, memory, x.data(), all, got.data(), B, I / 3, I);
    kernels.grad_weight_panels(c.dtype, w, memory, x.data(), all, got.data(), B, 0, I / 3);
    compare(c, all ? "grad_weight_panels of all" : "grad_weight_panels", got, grad);
  }

  if (G % 16 == 0 && B > 0) {
    Array both(c.dtype, size_t(B * I));
    got = Array(c.dtype, blocks * size_t(G));
    for (int side = 0; side < 2; side++)
      kernels.both_gradients(c.dtype, w, memory, x.data(), weight.data(), both.data(), got.data(), B, side ? I / 3 : 0,
                             side ? I : I / 3);
    compare(c, "both_gradients: input", both, at_nonzeros);
    compare(c, "both_gradients: weight", got, grad);
  }

  if (by_groups) {
    const int64_t parts = (B + kLinearGroupSamples - 1) / kLinearGroupSamples;
    const size_t size = size_t(parts * kLinearGroupSamples * I) * (c.dtype == DType::f64 ? 8 : 4);
    memory = scratch(7, size);
    std::memset(memory, 0xff, size);
    kernels.group_samples(c.dtype, x.data(), B, I, memory, 0, parts / 2);
    kernels.group_samples(c.dtype, x.data(), B, I, memory, parts / 2, parts);
    got = Array(c.dtype, blocks * size_t(G));
    kernels.grad_weight_groups(c.dtype, w, groups, grad_y.data(), memory, got.data(), B, count / 2, count);
    kernels.grad_weight_groups(c.dtype, w, groups, grad_y.data(), memory, got.data(), B, 0, count / 2);
    compare(c, "grad_weight_groups", got, grad);
  }

  if (pairs && B > 0) {
    const int64_t panels = ((O + G - 1) / G * G + kLinearPanel - 1) / kLinearPanel;
    const size_t size = size_t(panels * ((B + 1) / 2) * kLinearPanel) * 4;
    memory = scratch(7, size);
    std::memset(memory, 0xff, size);
    kernels.pair_rows(grad_y.data(), B, O, memory, 0, panels / 2);
    kernels.pair_rows(grad_y.data(), B, O, memory, panels / 2, panels);
    got = Array(c.dtype, blocks * size_t(G));
    kernels.grad_weight_pairs(w, memory, x.data(), got.data(), B, I / 3, I);
    kernels.grad_weight_pairs(w, memory, x.data(), got.data(), B, 0, I / 3);
    compare(c, "grad_weight_pairs", got, grad);
  }

  got = Array(c.dtype, size_t(I * O));
  kernels.expand(c.dtype, w, weight.data(), got.data(), 0, I, 0, O);
  compare(c, "expand", got, dense);
  const int64_t cut = O / 2 / kLinearPanel * kLinearPanel, last_rows = I - I / 3;
  for (int side = 0; side < 2; side++) {
    const int64_t first = side ? cut : 0, columns = side ? O - cut : cut;
    std::vector<double> part;
    for (int64_t i = I / 3; i < I; i++)
      for (int64_t o = first; o < first + columns; o++) part.push_back(dense[size_t(i * O + o)]);
    Array of(c.dtype, size_t(last_rows * columns));
    kernels.expand(c.dtype, w, weight.data(), of.data(), I / 3, I, first, first + columns);
    compare(c, "expand of a part", of, part);
  }
  Array back(c.dtype, blocks * size_t(G));
  kernels.collect(c.dtype, w, got.data(), back.data(), 0, I);
  for (size_t b = 0; b < blocks; b++)
    for (int64_t g = 0; g < G; g++) grad[b * G + g] = layer.rows[b] * G + g < O ? weight.at(b * G + g) : 0;
  compare(c, "collect", back, grad);
  int64_t nonzeros = 0;
  for (size_t i = 0; i < x.n; i++) nonzeros += x.at(i) != 0;
  if (kernels.count(c.dtype, x.data(), int64_t(x.n)) != nonzeros) std::printf("count\n"), failures++;
}

} // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "baseline";
  const char* const names[] = {"baseline", "avx2", "avx512"};
  const char* const capabilities[] = {"DEFAULT", "AVX2", "AVX512"};
  for (int i = 0; i < 3; i++)
    if (!std::strcmp(name, names[i])) set_isa(capabilities[i]);
  if (std::strcmp(isa_name(isa()), name)) return 77;
  const SparseLinearKernels& kernels = SPARSEKERN_SELECT(sparse_linear);
  std::mt19937 random(0);
  int cases = 0;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const int64_t B : {0, 1, 3, 70, 131})
      for (const auto& [I, O] : {std::pair<int64_t, int64_t>{1, 1}, {17, 15}, {33, 64}, {100, 129}, {150, 31}, {9, 1300}})
        for (const int64_t G : {1, 3, 16, 32, 48, 128})
          for (const double density : {0.0, 0.2, 1.0})
            for (const bool bits : {false, true}) {
              if (bits && G != 1) continue;
              if (O > 1000 ? B > 3 : B > 100 && O > 100) continue; // large both ways takes long
              check(kernels, {dtype, B, I, O, G, density, cases % 3 ? 0.2 : 1.0, bits}, random);
              cases++;
            }
  std::printf("%s: %d cases, %d failures\n", name, cases, failures);
  return failures != 0;
}
