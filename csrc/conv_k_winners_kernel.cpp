// A tile of the convolution's map stays in registers until its windows are pooled, so that the map, four times as large as
// what is pooled, is never written; the gradient of the weight needs only the winners' patches.
#include "conv_k_winners.h"

#include "k_winners_pooled.h"

namespace sparsekern {
namespace {

// Registers of channels of a tile: with two pooled columns, eight places of the map, they fill the register file.
#if defined(__AVX512F__)
constexpr int kRegs = 2;
#else
constexpr int kRegs = 1;
#endif
constexpr int kWidth = kRegLanes<float>;

// Packed weights: for each kRegs * kWidth channels (kWidth in the last group where they are odd) the bias, then the taps.
int64_t packed_size(int64_t C, int64_t taps) { return (C + kRegs * kWidth - 1) / (kRegs * kWidth) * kRegs * kWidth * (taps + 1); }

void pack(const float* weight, const float* bias, int64_t C, int64_t taps, float* packed) {
  constexpr int64_t kGroup = kRegs * kWidth;
  for (int64_t first = 0; first < C; first += kGroup)
    for (int64_t t = 0; t <= taps; t++)
      for (int64_t c = first; c < first + kGroup; c++)
        *packed++ = c >= C ? 0.0f : t > 0 ? weight[c * taps + t - 1] : bias == nullptr ? 0.0f : bias[c];
}

// kPooled windows beside each other of kWhole registers of channels. x: the image under the first place; at: that place in
// the map, of channel 0.
template <bool kTaken, int kPooled, int kWhole>
SPARSEKERN_INLINE void pool_tile(const ConvKWinnersArgs& a, const float* x, const float* weight, int64_t at, float* most,
                                 int32_t* taken) {
  reg<float> sums[2][2 * kPooled][kWhole];
  for (int i = 0; i < 4 * kPooled; i++)
    for (int r = 0; r < kWhole; r++) sums[i % 2][i / 2][r] = load_reg(weight + r * kWidth);
  for (int64_t kh = 0; kh < a.KH; kh++, x += a.width)
    for (int64_t kw = 0; kw < a.KW; kw++) {
      weight += kRegs * kWidth;
      reg<float> w[kWhole];
      for (int r = 0; r < kWhole; r++) w[r] = load_reg(weight + r * kWidth);
#pragma GCC unroll 2
      for (int row = 0; row < 2; row++)
#pragma GCC unroll 4
        for (int column = 0; column < 2 * kPooled; column++) {
          const reg<float> v = x[row * a.width + column + kw] - reg<float>{};
#pragma GCC unroll 2
          for (int r = 0; r < kWhole; r++) sums[row][column][r] = fma_reg(v, w[r], sums[row][column][r]);
        }
    }
  const int64_t C = a.pooled.C, row_size = a.pooled.W * C;
  reg<int32_t> lane;
  for (int l = 0; l < kWidth; l++) lane[l] = l;
#pragma GCC unroll 2
  for (int q = 0; q < kPooled; q++)
#pragma GCC unroll 2
    for (int r = 0; r < kWhole; r++) { // as in PyTorch, the first maximum counts and NaN is above all
      const int64_t from = at + 2 * q * C + r * kWidth;
      reg<float> best = sums[0][2 * q][r];
      reg<int32_t> place = lane + int32_t(from);
#pragma GCC unroll 4
      for (int i = 1; i < 4; i++) {
        const reg<float> v = sums[i / 2][2 * q + i % 2][r];
        const reg<int32_t> larger = (v > best) | (v != v);
        best = larger ? v : best;
        if constexpr (kTaken) place = larger ? lane + int32_t(from + i / 2 * row_size + i % 2 * C) : place;
      }
      std::memcpy(most + q * C + r * kWidth, &best, sizeof best);
      if constexpr (kTaken) std::memcpy(taken + q * C + r * kWidth, &place, sizeof place);
    }
}

template <bool kTaken, int kWhole>
void pool_channels(const ConvKWinnersArgs& a, const float* x, const float* weight, int64_t first, float* most,
                   int32_t* taken) {
  const int64_t C = a.pooled.C, P = a.pooled.H / 2, Q = a.pooled.W / 2;
  for (int64_t p = 0; p < P; p++) {
    const float* from = x + 2 * p * a.width;
    const int64_t at = 2 * p * a.pooled.W * C + first, to = p * Q * C + first;
    int64_t q = 0;
    for (; q + 2 <= Q; q += 2)
      pool_tile<kTaken, 2, kWhole>(a, from + 2 * q, weight, at + 2 * q * C, most + to + q * C, taken + to + q * C);
    if (q < Q) pool_tile<kTaken, 1, kWhole>(a, from + 2 * q, weight, at + 2 * q * C, most + to + q * C, taken + to + q * C);
  }
}

template <bool kTaken> void pool_convolved(const ConvKWinnersArgs& a, const float* x, float* most, int32_t* taken) {
  constexpr int64_t kGroup = kRegs * kWidth;
  const int64_t size = kGroup * (a.KH * a.KW + 1);
  for (int64_t first = 0; first < a.pooled.C; first += kGroup) {
    const float* weight = a.weight + first / kGroup * size;
    if (a.pooled.C - first >= kGroup) pool_channels<kTaken, kRegs>(a, x, weight, first, most, taken);
    else pool_channels<kTaken, 1>(a, x, weight, first, most, taken); // channels are a multiple of 16
  }
}

void forward(const ConvKWinnersArgs& a, int64_t begin, int64_t end, int64_t* counts) {
  for_counted_rows(a.pooled, begin, end, [&](int64_t begin, int64_t end) {
    forward_pooled_rows<float>(a.pooled, begin, end, counts, [&](int64_t row, float* most, int32_t* taken) {
      const float* x = a.x + row * a.height * a.width;
      if (a.pooled.offsets == nullptr) pool_convolved<false>(a, x, most, taken); // 12 % faster
      else pool_convolved<true>(a, x, most, taken);
    });
  });
}

void gradient(const ConvKWinnersArgs& a, const float* grad_y, int64_t begin, int64_t end, double* sums) {
  typedef float taps_t __attribute__((vector_size(4 * kMostTaps)));
  const PooledArgs& pooled = a.pooled;
  const int64_t n = pooled.rows.n, C = pooled.C, image = a.height * a.width, k = pooled.rows.k;
  const int64_t places = pooled.H * pooled.W, step = a.KH * kMostTaps;
  float* added = static_cast<float*>(scratch(kKeys, size_t(C * (step + 1)) * sizeof(float))); // (C, KH, 8), then (C,)
  float* grads = added + C * step;
  float* x = static_cast<float*>(scratch(kRoom, size_t(image + kMostTaps) * sizeof(float)));
  int32_t* under = static_cast<int32_t*>(scratch(kPooled, size_t(2 * places) * sizeof(int32_t))); // where a patch begins
  int32_t* window = under + places; // the pooled place that a place of the map belongs to
  for (int64_t p = 0; p < places; p++) {
    const int64_t row = p / pooled.W, column = p % pooled.W;
    under[p] = int32_t(row * a.width + column);
    window[p] = int32_t(row / 2 * (pooled.W / 2) + column / 2);
  }
  std::memset(added, 0, size_t(C * (step + 1)) * sizeof(float));
  std::memset(x + image, 0, kMostTaps * sizeof(float)); // the lanes beyond a kernel's columns reach past the image
  const double each = 1.0 / double(C);
  for (int64_t row = begin; row < end; row++) {
    std::memcpy(x, a.x + row * image, size_t(image) * sizeof(float));
    for (int64_t i = 0; i < k; i++) {
      const int64_t offset = pooled.offsets[row * k + i];
      const int64_t place = int64_t((double(offset) + 0.5) * each), c = offset - place * C; // half off any multiple of C: exact
      const float g = grad_y[row * n + window[place] * C + c];
      const float* patch = x + under[place];
      float* sum = added + c * step;
      grads[c] += g;
      for (int64_t kh = 0; kh < a.KH; kh++, sum += kMostTaps, patch += a.width) {
        taps_t total, v;
        std::memcpy(&total, sum, sizeof total);
        std::memcpy(&v, patch, sizeof v);
        total += v * g;
        std::memcpy(sum, &total, sizeof total);
      }
    }
  }
  for (int64_t c = 0; c < C; c++) {
    for (int64_t t = 0; t < a.KH * a.KW; t++) *sums++ = added[c * step + t / a.KW * kMostTaps + t % a.KW];
    *sums++ = grads[c];
  }
}

// Sums over places of two pixels' product, the second dy rows below and dx columns to the right of the first, or without kPairs
// of one pixel: first over the images, at every pixel, then over the places that bring the pixels under taps (kh, kw) and
// (kh + dy, kw + dx). Products of floats, summed in double.
template <bool kPairs>
void patch_sums(const float* x, int64_t rows, int64_t height, int64_t width, int64_t KH, int64_t KW, int64_t dy, int64_t dx,
                double* products) {
  const int64_t H = height - KH + 1, W = width - KW + 1, side = KH * KW + 1, image = height * width;
  const int64_t begin = dx < 0 ? -dx : 0, end = dx < 0 ? width : width - dx;
  const int64_t pitch = width + 1 + kLanes; // of sums: whole vectors are written, whose last lanes are not used
  const float* stop = x + rows * image;
  double* sums = static_cast<double*>(scratch(kPooled, size_t(height * pitch) * sizeof(double)));
  std::memset(sums, 0, size_t(height * pitch) * sizeof(double));
  for (int64_t b = 0; b < rows; b++)
    for (int64_t row = 0; row + dy < height; row++)
      for (int64_t c = begin; c < end; c += kLanes) {
        const auto wide = [&](const float* p) {
          return __builtin_convertvector(p + kLanes <= stop ? load(p) : load_first(p, stop - p), vec<double>);
        };
        const float* p = x + b * image + row * width + c;
        double* sum = sums + row * pitch + c + 1;
        vec<double> v = wide(p);
        if constexpr (kPairs) v *= wide(p + dy * width + dx);
        store(sum, load(sum) + v);
      }
  for (int64_t row = 0; row + dy < height; row++) {
    double* line = sums + row * pitch;
    double total = 0; // line[c] becomes the sum of the columns before c
    for (int64_t c = begin; c < end; c++) {
      const double next = total + line[c + 1];
      line[c] = total, total = next;
    }
    line[end] = total;
    for (int64_t kw = begin; kw < KW && kw + dx < KW; kw++)
      for (int64_t kh = row - H + 1 > 0 ? row - H + 1 : 0; kh <= row && kh + dy < KH; kh++) {
        const int64_t one = kh * KW + kw, other = kPairs ? (kh + dy) * KW + kw + dx : side - 1;
        products[one * side + other] += line[kw + W] - line[kw];
      }
  }
  for (int64_t kh = 0; kh + dy < KH; kh++)
    for (int64_t kw = begin; kw < KW && kw + dx < KW; kw++) {
      const int64_t one = kh * KW + kw, other = kPairs ? (kh + dy) * KW + kw + dx : side - 1;
      products[other * side + one] = products[one * side + other];
    }
}

// Pairs of taps are counted by their distance, each once: dy in 0..KH-1 and dx in -(KW-1)..KW-1, of which the last KW are for
// dy = 0; then the one of single taps.
int64_t patch_parts(int64_t KH, int64_t KW) { return (KH - 1) * (2 * KW - 1) + KW + 1; }

void patch_moments(const float* x, int64_t rows, int64_t height, int64_t width, int64_t KH, int64_t KW, int64_t part,
                   double* moments) {
  const int64_t below = (KH - 1) * (2 * KW - 1), side = KH * KW + 1;
  if (part < below) {
    patch_sums<true>(x, rows, height, width, KH, KW, part / (2 * KW - 1) + 1, part % (2 * KW - 1) - (KW - 1), moments);
  } else if (part < below + KW) {
    patch_sums<true>(x, rows, height, width, KH, KW, 0, part - below, moments);
  } else {
    patch_sums<false>(x, rows, height, width, KH, KW, 0, 0, moments);
    moments[side * side - 1] = double(rows * (height - KH + 1) * (width - KW + 1));
  }
}

} // namespace

extern const ConvKWinnersKernels SPARSEKERN_TABLE(conv_k_winners) = {
    packed_size, pack, forward, gradient, patch_parts, patch_moments};

} // namespace sparsekern
