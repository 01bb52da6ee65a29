// k-winners of one instruction set against a stable sort: winners exactly, outputs bit for bit, counts.
#include "k_winners.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernel_test.h"

namespace sparsekern {
namespace {

struct Shape {
  int64_t rows, n, k, channels, inner;
};

// The boosted value of a unit in the type that the kernels compare in.
template <class T> acc_t<T> boosted(T x, const std::vector<float>& factors, int64_t u) {
  return factors.empty() ? to_acc(x) : to_acc(x) * acc_t<T>(factors[size_t(u)]);
}

template <class T> std::vector<bool> wanted_winners(const T* x, const Shape& s, const std::vector<float>& factors) {
  std::vector<int64_t> order(size_t(s.n));
  std::iota(order.begin(), order.end(), 0);
  const auto channel_major = [&](int64_t u) {
    return std::pair(u / s.inner % s.channels, u);
  };
  const auto before = [&](int64_t a, int64_t b) {
    const auto va = boosted(x[a], factors, a), vb = boosted(x[b], factors, b);
    if (std::isnan(va) || std::isnan(vb)) {
      if (std::isnan(va) != std::isnan(vb)) return bool(std::isnan(va));
    } else if (va != vb) {
      return va > vb;
    }
    return channel_major(a) < channel_major(b);
  };
  std::sort(order.begin(), order.end(), before);
  std::vector<bool> wins(size_t(s.n), false);
  for (int64_t i = 0; i < s.k; i++) wins[size_t(order[size_t(i)])] = true;
  return wins;
}

template <class T>
void check_case(DType dtype, const Shape& s, const std::vector<T>& x, const std::vector<float>& factors, const char* name) {
  const KWinnersKernels& kernels = SPARSEKERN_SELECT(k_winners);
  const int64_t bytes = (s.n + 15) / 16 * 2;
  std::vector<T> y(x.size());
  std::vector<uint8_t> winners(size_t(s.rows * bytes), 0xaa);
  std::vector<int64_t> counts(size_t(s.channels), 0), wanted_counts(size_t(s.channels), 0);
  const KWinnersArgs args{dtype, x.data(), y.data(), winners.data(), factors.empty() ? nullptr : factors.data(),
                          s.n, s.k, s.channels, s.inner};
  kernels.forward(args, 0, s.rows, counts.data());
  std::vector<T> grad(x.size());
  kernels.backward(dtype, x.data(), winners.data(), grad.data(), s.n, 0, s.rows);
  for (int64_t row = 0; row < s.rows; row++) {
    const std::vector<bool> wins = wanted_winners(x.data() + row * s.n, s, factors);
    for (int64_t u = 0; u < bytes * 8; u++) {
      const bool bit = winners[size_t(row * bytes + u / 8)] >> (u % 8) & 1;
      expect(bit == (u < s.n && wins[size_t(u)]), "%s: n=%lld k=%lld dtype %d: bit %lld of row %lld is %d", name,
             (long long)s.n, (long long)s.k, int(dtype), (long long)u, (long long)row, int(bit));
    }
    for (int64_t u = 0; u < s.n; u++) {
      const size_t at = size_t(row * s.n + u);
      const T zero{};
      const T* value = wins[size_t(u)] ? &x[at] : &zero;
      expect(std::memcmp(&y[at], value, sizeof(T)) == 0, "%s: n=%lld: output %lld is wrong", name, (long long)s.n, (long long)u);
      expect(std::memcmp(&grad[at], value, sizeof(T)) == 0, "%s: n=%lld: gradient %lld is wrong", name, (long long)s.n,
             (long long)u);
      if (wins[size_t(u)]) wanted_counts[size_t(u / s.inner % s.channels)]++;
    }
  }
  expect(counts == wanted_counts, "%s: n=%lld k=%lld channels=%lld inner=%lld: counts are wrong", name, (long long)s.n,
         (long long)s.k, (long long)s.channels, (long long)s.inner);
}

template <class T> void check_dtype(DType dtype, std::mt19937& random) {
  using A = acc_t<T>;
  std::normal_distribution<double> normal;
  constexpr A kInf = std::numeric_limits<A>::infinity(), kNan = std::numeric_limits<A>::quiet_NaN();
  const Shape shapes[] = {{1, 1, 1, 1, 1},        {2, 7, 0, 7, 1},        {3, 16, 5, 16, 1},    {2, 17, 17, 17, 1},
                          {4, 100, 10, 100, 1},   {3, 1000, 100, 1000, 1}, {2, 5000, 40, 5000, 1},
                          {5, 9 * 7, 20, 7, 9},   {5, 9 * 7, 20, 7, 1},   {4, 32 * 36, 90, 32, 36},
                          {4, 32 * 36, 90, 32, 1}, {2, 64 * 196, 1200, 64, 196}};
  for (const Shape& s : shapes)
    for (int kind = 0; kind < 6; kind++)
      for (const bool boosting : {false, true}) {
        static const char* const names[] = {"normal", "equal", "ties", "sorted", "special", "subnormal"};
        std::vector<T> x(size_t(s.rows * s.n));
        for (size_t i = 0; i < x.size(); i++) {
          const A special[] = {kNan, kInf, -kInf, A(0), A(-0.0), A(1), A(-1)};
          A v = A(normal(random));
          if (kind == 1) v = A(1.5);
          if (kind == 2) v = A(std::round(v));
          if (kind == 3) v = A(double(i) / 64);
          if (kind == 4) v = special[random() % 7];
          if (kind == 5) v *= sizeof(A) == 8 ? A(1e-310) : A(1e-40);
          from_acc(v, x[i]);
        }
        std::vector<float> factors;
        if (boosting) {
          std::vector<float> duty(size_t(s.channels));
          for (float& d : duty) d = float(random() % 1000) / 1000;
          factors.resize(size_t(s.n));
          const double target = double(s.k) / double(s.n), strength = 1.5;
          SPARSEKERN_SELECT(k_winners)
              .boost_factors(duty.data(), target, strength, s.channels, s.inner, s.n, factors.data());
          for (int64_t u = 0; u < s.n; u++) {
            const float wanted = float(std::exp((target - double(duty[size_t(u / s.inner % s.channels)])) * strength));
            expect(factors[size_t(u)] == wanted, "boost factor %lld: %.9g, wanted %.9g", (long long)u,
                   double(factors[size_t(u)]), double(wanted));
          }
        }
        check_case<T>(dtype, s, x, factors, names[kind]);
      }
}

void check_update() {
  std::vector<float> duty{0.0f, 0.25f, 1.0f};
  const std::vector<int64_t> counts{0, 3, 8};
  SPARSEKERN_SELECT(k_winners).update(duty.data(), counts.data(), 3, 0.75, 16.0);
  expect(duty == std::vector<float>{0.0f, 0.375f, 1.25f}, "update: %g %g %g", double(duty[0]), double(duty[1]), double(duty[2]));
}

} // namespace
} // namespace sparsekern

int main(int argc, char** argv) {
  using namespace sparsekern;
  if (!choose_isa(argc, argv)) return 77;
  std::mt19937 random(0);
  check_dtype<float>(DType::f32, random);
  check_dtype<double>(DType::f64, random);
  check_dtype<bf16>(DType::bf16, random);
  check_dtype<f16>(DType::f16, random);
  check_update();
  return result();
}
