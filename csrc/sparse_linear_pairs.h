// bfloat16 times a dense matrix laid out tile by tile as pairs of neighbouring rows, for instructions that multiply and add
// pairs (AVX512-BF16): as fast as PyTorch's dense product once the weights are laid out, and these stay in the first-level
// cache.
#pragma once
#include "sparse_linear_panels.h"
#include "transpose.h"

namespace sparsekern {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// The instructions of newer processors, asked for at run time.
#define SPARSEKERN_PAIRS __attribute__((target("avx512bf16,avx512vbmi2")))
#define SPARSEKERN_PAIRS_INLINE inline __attribute__((always_inline, target("avx512bf16,avx512vbmi2")))
inline bool has_pairs() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  return has;
}

constexpr int64_t kPairs = 64;         // of a tile: with kPanel columns 16 KB
constexpr int64_t kDepth = 2 * kPairs; // rows of the dense matrix in a tile

// The weights of an input at 64 outputs, zeros where none exists: by a bitmap, of blocks of whole sixteens, or where all
// exist. Words of an input are asked for in ascending order.
class WeightWords {
 public:
  // Slots for `slots` inputs at a time, and outputs up to `until`. If not `readable`, weights can only be put.
  WeightWords(const LinearSupport& w, const bf16* weight, int64_t slots, int64_t until, bool readable = true)
      : w_(w), until_(until), weights_(w, weight, has_bits<bf16>(w) && readable, 32), base_(weight),
        groups_((w.outputs + w.group - 1) / w.group),
        full_(w.ccol[w.inputs] == w.inputs * groups_), words_(has_bits<bf16>(w) ? 0 : (groups_ * w.group / kLanes + 63) / 64),
        next_((int64_t*)scratch(kSamples, size_t(slots * (1 + words_)) * 8)), sixteens_((uint64_t*)next_ + slots) {}
  // Slot s is input i from a word on.
  void start(int64_t s, int64_t i, int64_t word) {
    next_[s] = full_ ? 0 : has_bits<bf16>(w_) ? weights_before(w_, i, word) : start_blocks(sixteens_ + s * words_, i, word);
  }
  // Lanes 0 to 31 and 32 to 63 of input i, which slot s is.
  SPARSEKERN_PAIRS_INLINE void get(int64_t s, int64_t i, int64_t word, __m512i& low, __m512i& high) {
    if (full_) get_all(i, word, low, high);
    else if (has_bits<bf16>(w_)) get_by_bits(s, i, word, low, high);
    else get_blocks(s, i, word, low, high);
  }
  // The way back: those of lanes 0 to 31 and 32 to 63 that exist, to grad as the weights are stored.
  SPARSEKERN_PAIRS_INLINE void put(int64_t s, int64_t i, int64_t word, __m512i low, __m512i high, bf16* grad) {
    if (full_) return put_all(i, word, low, high, grad);
    const int64_t last = int64_t(w_.ccol[i + 1]) * w_.group;
    bf16* at = grad + int64_t(w_.ccol[i]) * w_.group + next_[s];
    if (has_bits<bf16>(w_)) {
      const uint64_t mask = w_.bits[i * bit_words(w_) + word];
      const int64_t count = __builtin_popcountll(mask << 32), both = __builtin_popcountll(mask);
      put_first(count, _mm512_mask_compress_epi16(fresh(), __mmask32(mask), low), at, grad + last);
      put_first(both - count, _mm512_mask_compress_epi16(fresh(), __mmask32(mask >> 32), high), at + count, grad + last);
      next_[s] += both;
    } else {
      const uint32_t four = sixteens(s, word);
      const int64_t count = kCounts[four & 3], both = count + kCounts[four >> 2];
      put_first(count, _mm512_mask_compress_epi64(fresh(), kQuarters[four & 3], low), at, grad + last);
      put_first(both - count, _mm512_mask_compress_epi64(fresh(), kQuarters[four >> 2], high), at + count, grad + last);
      next_[s] += both;
    }
    __builtin_prefetch(at + 64, 1), __builtin_prefetch(at + 96, 1);
  }

 private:
  const LinearSupport& w_;
  int64_t until_;
  const PaddedWeights<bf16> weights_;
  const bf16* base_;
  int64_t groups_;
  bool full_; // stored it is the dense matrix
  int64_t words_;
  int64_t* next_; // each slot's next weight, after the input's first
  uint64_t* sixteens_; // (slots, words): the sixteens of outputs at which a slot's input has blocks

  SPARSEKERN_PAIRS_INLINE void get_all(int64_t i, int64_t word, __m512i& low, __m512i& high) const {
    const int64_t left = w_.outputs - word * 64;
    const __mmask64 mask = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    const bf16* at = base_ + i * groups_ * w_.group + word * 64;
    __builtin_prefetch(at + 64), __builtin_prefetch(at + 96);
    low = _mm512_maskz_loadu_epi16(__mmask32(mask), at);
    high = _mm512_maskz_loadu_epi16(__mmask32(mask >> 32), at + 32);
  }

  SPARSEKERN_PAIRS_INLINE void get_by_bits(int64_t s, int64_t i, int64_t word, __m512i& low, __m512i& high) {
    const uint64_t mask = w_.bits[i * bit_words(w_) + word];
    const bf16* at = weights_.of_input(i) + next_[s];
    __builtin_prefetch(at + 64), __builtin_prefetch(&w_.bits[i * bit_words(w_) + word + 8]);
    low = _mm512_mask_expand_epi16(fresh(), __mmask32(mask), _mm512_loadu_si512(at));
    high = _mm512_mask_expand_epi16(fresh(), __mmask32(mask >> 32), _mm512_loadu_si512(at + __builtin_popcountll(mask << 32)));
    next_[s] += __builtin_popcountll(mask);
  }

  // The bitmap of an input's blocks from a word on; returns how many weights lie before that.
  int64_t start_blocks(uint64_t* sixteens, int64_t i, int64_t word) const {
    const int64_t size = w_.group / kLanes, stop = (until_ + kLanes - 1) / kLanes; // in sixteens: a block, and all outputs
    const int64_t first = first_block(w_, i, word * 64 / w_.group);
    const int32_t *row = w_.rows + first, *end = w_.rows + w_.ccol[i + 1];
    uint64_t bits = 0; // in a register: each change of memory would wait for the one before it
    int64_t filled = 0;
    const auto put = [&](uint32_t v) {
      for (; filled < v / 64; bits = 0) sixteens[filled++] = bits;
      bits |= uint64_t(1) << (v % 64);
    };
    if (size == 1)
      for (; row < end && *row < stop; row++) put(*row);
    else
      for (; row < end && *row * size < stop; row++)
        for (int64_t v = *row * size; v < (*row + 1) * size; v++) put(v);
    for (; filled < words_; bits = 0) sixteens[filled++] = bits;
    // A block of more than 64 outputs may begin before the word.
    const int64_t within = word * 4 % size;
    const bool cut = within != 0 && (sixteens[word * 4 / 64] >> (word * 4 % 64) & 1) != 0;
    return (first - w_.ccol[i]) * w_.group + (cut ? within * kLanes : 0);
  }

  SPARSEKERN_PAIRS_INLINE void get_blocks(int64_t s, int64_t i, int64_t word, __m512i& low, __m512i& high) {
    const uint32_t four = sixteens(s, word);
    const bf16* at = base_ + int64_t(w_.ccol[i]) * w_.group + next_[s];
    __builtin_prefetch(at + 64), __builtin_prefetch(at + 96);
    low = get_two(four & 3, at);
    high = get_two(four >> 2, at + kCounts[four & 3]);
    next_[s] += kCounts[four & 3] + kCounts[four >> 2];
  }

  // Which of a word's four sixteens a slot's input has.
  SPARSEKERN_PAIRS_INLINE uint32_t sixteens(int64_t s, int64_t word) const {
    return uint32_t(sixteens_[s * words_ + word / 16] >> (word % 16 * 4)) & 15;
  }
  // The first `count` lanes: all are written where that stays below `end`, over what comes next.
  static SPARSEKERN_PAIRS_INLINE void put_first(int64_t count, __m512i v, bf16* at, const bf16* end) {
    if (at + 2 * kLanes <= end) _mm512_storeu_si512(at, v);
    else _mm512_mask_storeu_epi16(at, __mmask32((uint64_t(1) << count) - 1), v);
  }
  SPARSEKERN_PAIRS_INLINE void put_all(int64_t i, int64_t word, __m512i low, __m512i high, bf16* grad) const {
    const int64_t stored = groups_ * w_.group, left = stored - word * 64;
    const __mmask64 mask = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    bf16* at = grad + i * stored + word * 64;
    _mm512_mask_storeu_epi16(at, __mmask32(mask), low);
    _mm512_mask_storeu_epi16(at + 32, __mmask32(mask >> 32), high);
  }

  // Of two sixteens those that exist.
  static constexpr uint8_t kCounts[] = {0, 16, 16, 32}, kQuarters[] = {0, 0x0f, 0xf0, 0xff};
  static constexpr uint32_t kLoaded[] = {0, 0xffff, 0xffff, 0xffffffff};
  static SPARSEKERN_PAIRS_INLINE __m512i get_two(uint32_t two, const bf16* at) {
    return _mm512_mask_expand_epi64(fresh(), kQuarters[two], _mm512_maskz_loadu_epi16(kLoaded[two], at));
  }
};

// Where lane k of the sums of 32 outputs belongs: pairs come out of the 128-bit parts of two registers.
inline __m512i lanes_of_low() { return _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23); }
inline __m512i lanes_of_high() {
  return _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

// Pairs of inputs times outputs: tile (kPairs, kPanel) of two elements, whose columns are ordered as lanes_of_low() says.
struct InputPairs {
  WeightWords words;
  int64_t inputs, first_word, input = 0, count = 0;

  InputPairs(const LinearSupport& w, const bf16* weight, int64_t first, int64_t last)
      : words(w, weight, kDepth, last), inputs(w.inputs), first_word(first / 64) {}
  void begin(int64_t i, int64_t rows) {
    input = i, count = rows;
    for (int64_t r = 0; r < rows; r++) words.start(r, i + r, first_word);
  }
  SPARSEKERN_PAIRS void fill(int64_t c, uint32_t* tile) {
    for (int64_t r = 0; r < count; r += 2, tile += kPanel) {
      __m512i a0, a1, b0 = _mm512_setzero_si512(), b1 = b0;
      words.get(r, input + r, first_word + c, a0, a1);
      if (r + 1 < count) words.get(r + 1, input + r + 1, first_word + c, b0, b1);
      _mm512_store_si512(tile, _mm512_unpacklo_epi16(a0, b0));
      _mm512_store_si512(tile + 16, _mm512_unpackhi_epi16(a0, b0));
      _mm512_store_si512(tile + 32, _mm512_unpacklo_epi16(a1, b1));
      _mm512_store_si512(tile + 48, _mm512_unpackhi_epi16(a1, b1));
    }
  }
};

// Pairs of outputs times inputs [first, last): tile (kPairs, kPanel) of two elements.
struct OutputPairs {
  WeightWords words;
  int64_t first, columns, word = 0, count = 0;

  OutputPairs(const LinearSupport& w, const bf16* weight, int64_t first_, int64_t last)
      : words(w, weight, last - first_, w.outputs), first(first_), columns(last - first_) {
    for (int64_t k = 0; k < columns; k++) words.start(k, first + k, 0);
  }
  void begin(int64_t o, int64_t rows) { word = o / 64, count = rows; }
  SPARSEKERN_PAIRS void fill(int64_t c, uint32_t* tile) {
    for (int64_t k = 0; k < count; k += 64)
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        vec<float> low[kLanes], high[kLanes];
        for (int64_t i = 0; i < kLanes; i++) {
          const int64_t at = c * kPanel + v + i;
          __m512i a = _mm512_setzero_si512(), b = a;
          if (at < columns) words.get(at, first + at, word + k / 64, a, b);
          low[i] = (vec<float>)a, high[i] = (vec<float>)b;
        }
        transpose(low), transpose(high);
        for (int64_t p = 0; p < kLanes; p++) {
          store((float*)tile + (k / 2 + p) * kPanel + v, low[p]);
          store((float*)tile + (k / 2 + 16 + p) * kPanel + v, high[p]);
        }
      }
  }
};

// sums (kRows, kPanel) (zeros if `fresh`) += x (kRows, pairs) times a tile's first `pairs` pairs. Pair p of row r lies at
// x[r * kRowStep + p * kPairStep].
template <int64_t kRowStep, int64_t kPairStep, int kRows>
SPARSEKERN_PAIRS void add_pairs(const uint32_t* x, const uint32_t* tile, int64_t pairs, bool fresh, float* sums) {
  __m512 sum[kRows][4];
  const __mmask16 old = fresh ? 0 : 0xffff;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) sum[r][v] = _mm512_maskz_load_ps(old, sums + r * kPanel + v * kLanes);
  for (int64_t p = 0; p < pairs; p++, tile += kPanel, x += kPairStep) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) w[v] = _mm512_load_si512(tile + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(x[r * kRowStep]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, (__m512bh)w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_store_ps(sums + r * kPanel + v * kLanes, sum[r][v]);
}

// The same for any number of rows.
template <int64_t kRowStep, int64_t kPairStep>
void add_pairs(int64_t rows, const uint32_t* x, const uint32_t* tile, int64_t pairs, bool fresh, float* sums) {
  for_rows(rows, [&]<int kRows>(int64_t r) {
    add_pairs<kRowStep, kPairStep, kRows>(x + r * kRowStep, tile, pairs, fresh, sums + r * kPanel);
  });
}

// The sums (panels, rows, kPanel) = x (rows, K; stride K) times the matrix (K, columns) of which `tiles` lays out kDepth rows
// at a time.
template <class Tiles>
const float* multiply_pairs(const bf16* x, int64_t K, int64_t rows, int64_t columns, Tiles& tiles) {
  float* sums = (float*)scratch(kSums, size_t(rows * round_up(columns, kPanel)) * sizeof(float));
  uint32_t* tile = (uint32_t*)scratch(kTiles, size_t(kPairs * kPanel) * 4);
  uint32_t* part = (uint32_t*)scratch(kLists, size_t(rows * kPairs) * 4); // of x, with whole pairs
  for (int64_t first = 0; first < K; first += kDepth) {
    const int64_t count = min(kDepth, K - first), pairs = (count + 1) / 2;
    for (int64_t s = 0; s < rows; s++) {
      part[s * kPairs + pairs - 1] = 0;
      std::memcpy((void*)(part + s * kPairs), x + s * K + first, size_t(count) * sizeof(bf16));
    }
    tiles.begin(first, count);
    for (int64_t c = 0; c * kPanel < columns; c++) {
      tiles.fill(c, tile);
      float* sum = sums + c * rows * kPanel;
      add_pairs<kPairs, 1>(rows, part, tile, pairs, first == 0, sum);
    }
  }
  return sums;
}

// Outputs [first, last) of x W^T + bias for rows [begin, end).
inline void forward_pairs(const LinearSupport& w, const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int64_t begin,
                          int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - begin, columns = last - first;
  InputPairs tiles(w, weight, first, last);
  const float* sums = multiply_pairs(x + begin * w.inputs, w.inputs, rows, columns, tiles);
  for (int64_t s = 0; s < rows; s++)
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
      const float* at = sums + c / kPanel * (rows * kPanel) + s * kPanel + c % kPanel;
      const __m512 a = _mm512_load_ps(at), b = _mm512_load_ps(at + kLanes);
      const vec<float> sum[2] = {(vec<float>)_mm512_permutex2var_ps(a, lanes_of_low(), b),
                                 (vec<float>)_mm512_permutex2var_ps(a, lanes_of_high(), b)};
      for (int64_t v = 0, o = first + c; v < 2 && o < last; v++, o += kLanes)
        store_first(y + (begin + s) * w.outputs + o, bias ? sum[v] + load_first(bias + o, last - o) : sum[v], last - o);
    }
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero if at_nonzeros.
inline void grad_input_pairs(const LinearSupport& w, const bf16* grad_y, const bf16* x, const bf16* weight, bf16* grad_x,
                             bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - begin, columns = last - first;
  OutputPairs tiles(w, weight, first, last);
  const float* sums = multiply_pairs(grad_y + begin * w.outputs, w.outputs, rows, columns, tiles);
  const bf16* where = x + begin * w.inputs + first;
  store_sums(grad_x + begin * w.inputs + first, w.inputs, rows, columns, [&](int64_t s, int64_t c) {
    const vec<float> sum = load(sums + c / kPanel * (rows * kPanel) + s * kPanel + c % kPanel);
    if (!at_nonzeros) return sum;
    return load_first(where + s * w.inputs + c, columns - c) != 0 ? sum : vec<float>{};
  });
}

// Sixteen columns, or the first `columns` of them, of rows 2p and 2p + 1 of a (B, n) matrix as pairs; zeros beyond.
SPARSEKERN_INLINE __m512i load_pairs(const bf16* x, int64_t n, int64_t B, int64_t p, int64_t columns) {
  const __mmask16 mask = columns >= kLanes ? 0xffff : columns <= 0 ? 0 : __mmask16((1u << columns) - 1);
  const bf16* at = x + 2 * p * n;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(2 * p + 1 < B ? mask : __mmask16(0), at + n));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Pairs of samples: tiles (panels, ceil(B / 2), kPanel) of grad_y (B, O), zeros beyond. Panels [begin, end).
inline void pair_rows(const bf16* grad_y, int64_t B, int64_t O, uint32_t* tiles, int64_t begin, int64_t end) {
  const int64_t pairs = (B + 1) / 2;
  uint32_t* to = tiles + begin * pairs * kPanel;
  for (int64_t c = begin; c < end; c++)
    for (int64_t p = 0; p < pairs; p++, to += kPanel)
      for (int64_t v = 0, o = c * kPanel; v < kPanel; v += kLanes, o += kLanes)
        _mm512_store_si512(to + v, load_pairs(grad_y + o, O, B, p, O - o));
}

SPARSEKERN_PAIRS_INLINE __m512i narrowed(const float* sums) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + kLanes), _mm512_load_ps(sums));
}

// The stored weights of inputs [begin, end) of grad_y^T x, from the tiles of grad_y.
inline SPARSEKERN_PAIRS void grad_weight_pairs(const LinearSupport& w, const uint32_t* tiles, const bf16* x, bf16* grad,
                                               int64_t B, int64_t begin, int64_t end) {
  constexpr int64_t kInputs = 8 * kTileSums;
  const int64_t pairs = (B + 1) / 2, outputs = (w.outputs + w.group - 1) / w.group * w.group;
  uint32_t* part = (uint32_t*)scratch(kLists, size_t(pairs * kInputs) * 4);
  float* sums = (float*)scratch(kSums, size_t(kInputs * kPanel) * sizeof(float));
  WeightWords words(w, grad, kInputs, outputs, false);
  for (int64_t i = begin; i < end; i += kInputs) {
    const int64_t inputs = min(kInputs, end - i);
    for (int64_t p = 0; p < pairs; p++)
      for (int64_t k = 0; k < kInputs; k += kLanes)
        _mm512_store_si512(part + p * kInputs + k, load_pairs(x + i + k, w.inputs, B, p, inputs - k));
    for (int64_t k = 0; k < inputs; k++) words.start(k, i + k, 0);
    for (int64_t c = 0; c * kPanel < outputs; c++) {
      for (int64_t p = 0; p < pairs; p += kPairs)
        add_pairs<1, kInputs>(inputs, part + p * kInputs, tiles + (c * pairs + p) * kPanel, min(kPairs, pairs - p), p == 0,
                              sums);
      clear_beyond(w.outputs - c * kPanel, inputs, sums); // infinite times zero
      for (int64_t k = 0; k < inputs; k++) {
        const float* sum = sums + k * kPanel;
        words.put(k, i + k, c, narrowed(sum), narrowed(sum + 2 * kLanes), grad);
      }
    }
  }
}
#else
inline bool has_pairs() { return false; }
inline void forward_pairs(const LinearSupport&, const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t,
                          int64_t) {}
inline void grad_input_pairs(const LinearSupport&, const bf16*, const bf16*, const bf16*, bf16*, bool, int64_t, int64_t,
                             int64_t, int64_t) {}
inline void pair_rows(const bf16*, int64_t, int64_t, uint32_t*, int64_t, int64_t) {}
inline void grad_weight_pairs(const LinearSupport&, const uint32_t*, const bf16*, bf16*, int64_t, int64_t, int64_t) {}
#endif

} // namespace
} // namespace sparsekern
