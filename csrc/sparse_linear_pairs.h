// bfloat16 times a dense matrix laid out tile by tile as pairs of neighbouring rows, for instructions that multiply and add
// pairs (AVX512-BF16): as fast as PyTorch's dense product once the weights are laid out, and these stay in the first-level
// cache.
#pragma once
#include "sparse_linear_layout.h"
#include "sparse_linear_panels.h"

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

constexpr int64_t kPairs = 128;        // of a tile at most: with kPanel columns 32 KB
constexpr int64_t kDepth = 2 * kPairs; // inputs of a tile
constexpr int kDotInputs = 4;          // inputs whose gradients are summed at a time

// The weights of an input at 64 outputs, zeros where none exists: of blocks of whole sixteens, or where all exist; to be put
// by a bitmap too. Words of an input are asked for in ascending order.
class WeightWords {
 public:
  // Slots for `slots` inputs at a time, and outputs up to `until`.
  WeightWords(const LinearSupport& w, const bf16* weight, int64_t slots, int64_t until)
      : w_(w), until_(until), base_(weight), groups_((w.outputs + w.group - 1) / w.group),
        full_(w.ccol[w.inputs] == w.inputs * groups_), words_(has_bits<bf16>(w) ? 0 : (groups_ * w.group / kLanes + 63) / 64),
        next_((int64_t*)scratch(kSamples, size_t(slots * (1 + words_)) * 8)), sixteens_((uint64_t*)next_ + slots) {}
  // Slot s is input i from a word on.
  void start(int64_t s, int64_t i, int64_t word) {
    next_[s] = full_ ? 0 : has_bits<bf16>(w_) ? weights_before(w_, i, word) : start_blocks(sixteens_ + s * words_, i, word);
  }
  bool by_bits() const { return has_bits<bf16>(w_) && !full_; }
  // Lanes 0 to 31 and 32 to 63 of input i, which slot s is; not by bits.
  SPARSEKERN_PAIRS_INLINE void get(int64_t s, int64_t i, int64_t word, __m512i& low, __m512i& high) {
    if (full_) get_all(i, word, low, high);
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

// Lanes 0 to 31 and 32 to 63 of a word's weights, from `at` on; returns how many there are.
SPARSEKERN_PAIRS_INLINE int64_t spread(uint64_t word, const bf16* at, __m512i& low, __m512i& high) {
  __builtin_prefetch(at + 64);
  const __mmask64 mask = _cvtu64_mask64(word);
  const __m512i rest = _mm512_loadu_si512(at + __builtin_popcountll(word << 32));
  low = _mm512_mask_expand_epi16(fresh(), __mmask32(mask), _mm512_loadu_si512(at));
  high = _mm512_mask_expand_epi16(fresh(), __mmask32(_kshiftri_mask64(mask, 32)), rest);
  return __builtin_popcountll(word);
}

// Pairs of inputs times outputs: tile (kPairs, kPanel) of two elements, whose columns are ordered as lanes_of_low() says.
class InputPairs {
 public:
  InputPairs(const LinearSupport& w, const bf16* weight, int64_t first, int64_t last)
      : w_(w), words_(w, weight, kDepth, last), weights_(w, weight, words_.by_bits(), 32), first_word_(first / 64) {}
  // Inputs from i on.
  void begin(int64_t i, int64_t inputs) {
    first_ = i, inputs_ = inputs;
    for (int64_t k = 0; k < inputs; k++)
      if (words_.by_bits()) next_[k] = weights_.of_input(i + k) + weights_before(w_, i + k, first_word_);
      else words_.start(k, i + k, first_word_);
  }
  SPARSEKERN_PAIRS void fill(int64_t c, uint32_t* tile) {
    const int64_t word = first_word_ + c;
    if (words_.by_bits()) return fill_by_bits(w_.bits + first_ * bit_words(w_) + word, bit_words(w_), inputs_, next_, tile);
    for (int64_t k = 0; k < inputs_; k += 2, tile += kPanel) {
      __m512i a0, a1, b0 = _mm512_setzero_si512(), b1 = b0;
      words_.get(k, first_ + k, word, a0, a1);
      if (k + 1 < inputs_) words_.get(k + 1, first_ + k + 1, word, b0, b1);
      store_two(tile, a0, a1, b0, b1);
    }
  }

 private:
  const LinearSupport& w_;
  WeightWords words_;
  const PaddedWeights<bf16> weights_;
  int64_t first_word_, first_ = 0, inputs_ = 0;
  const bf16* next_[kDepth]; // by a bitmap: each input's next weight

  // A word of each input, `stride` words apart.
  static SPARSEKERN_PAIRS void fill_by_bits(const uint64_t* bits, int64_t stride, int64_t inputs, const bf16** next,
                                            uint32_t* tile) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < inputs; k += 2, tile += kPanel, bits += 2 * stride) {
      __m512i a0, a1, b0 = _mm512_setzero_si512(), b1 = b0;
      next[k] += spread(bits[0], next[k], a0, a1);
      if (k + 1 < inputs) [[likely]] next[k + 1] += spread(bits[stride], next[k + 1], b0, b1);
      store_two(tile, a0, a1, b0, b1);
    }
  }
  static SPARSEKERN_PAIRS_INLINE void store_two(uint32_t* tile, __m512i a0, __m512i a1, __m512i b0, __m512i b1) {
    _mm512_store_si512(tile, _mm512_unpacklo_epi16(a0, b0));
    _mm512_store_si512(tile + 16, _mm512_unpackhi_epi16(a0, b0));
    _mm512_store_si512(tile + 32, _mm512_unpacklo_epi16(a1, b1));
    _mm512_store_si512(tile + 48, _mm512_unpackhi_epi16(a1, b1));
  }
};

// sums (kRows, kPanel) (zeros if `fresh`) += x (kRows, pairs) times a tile's first `pairs` pairs.
template <int kRows>
SPARSEKERN_PAIRS void add_pairs(const uint32_t* x, const uint32_t* tile, int64_t pairs, bool fresh, float* sums) {
  __m512 sum[kRows][4];
  const __mmask16 old = fresh ? 0 : 0xffff;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) sum[r][v] = _mm512_maskz_load_ps(old, sums + r * kPanel + v * kLanes);
  for (int64_t p = 0; p < pairs; p++, tile += kPanel) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) w[v] = _mm512_load_si512(tile + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(x[r * pairs + p]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, (__m512bh)w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_store_ps(sums + r * kPanel + v * kLanes, sum[r][v]);
}

// The sums (panels, rows, kPanel) = x (rows, K; stride K) times the matrix (K, columns) that `tiles` lays out.
inline const float* multiply_pairs(const bf16* x, int64_t K, int64_t rows, int64_t columns, InputPairs& tiles) {
  float* sums = (float*)scratch(kSums, size_t(rows * round_up(columns, kPanel)) * sizeof(float));
  uint32_t* tile = (uint32_t*)scratch(kTiles, size_t(kPairs * kPanel) * 4);
  uint32_t* part = (uint32_t*)scratch(kLists, size_t(rows * kPairs) * 4); // of x (rows, pairs)
  // Few rows take less time if fewer inputs' weights are read at once, many if their sums are in memory less often.
  const int64_t depth = rows < 16 ? kDepth / 4 : rows < 128 ? kDepth / 2 : kDepth;
  for (int64_t first = 0; first < K; first += depth) {
    const int64_t count = min(depth, K - first), pairs = (count + 1) / 2;
    for (int64_t s = 0; s < rows; s++) {
      part[(s + 1) * pairs - 1] = 0; // of the last, one half may not exist
      std::memcpy((void*)(part + s * pairs), x + s * K + first, size_t(count) * sizeof(bf16));
    }
    tiles.begin(first, count);
    for (int64_t c = 0; c * kPanel < columns; c++) {
      tiles.fill(c, tile);
      float* sum = sums + c * rows * kPanel;
      for_rows(rows, [&]<int kRows>(int64_t r) {
        add_pairs<kRows>(part + r * pairs, tile, pairs, first == 0, sum + r * kPanel);
      });
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

// Of each 128 bits of two registers the lower halves, or the upper ones.
SPARSEKERN_PAIRS_INLINE __m512d low_halves(__m512d a, __m512d b) {
  return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
}
SPARSEKERN_PAIRS_INLINE __m512d high_halves(__m512d a, __m512d b) {
  return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
SPARSEKERN_PAIRS_INLINE __m512 halved(__m512 a, __m512 b) {
  return (__m512)low_halves((__m512d)a, (__m512d)b) + (__m512)high_halves((__m512d)a, (__m512d)b);
}

// The sums of the lanes of four registers.
SPARSEKERN_PAIRS_INLINE __m128 lane_sums(const __m512 (&v)[4]) {
  const __m512 a = halved(v[0], v[1]), b = halved(v[2], v[3]); // of each 128 bits two sums of the first, and of the second
  const __m512 c = __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
                   __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  const __m256 d = __builtin_shufflevector(c, c, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(c, c, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(d, d, 0, 1, 2, 3) + __builtin_shufflevector(d, d, 4, 5, 6, 7);
}

// sum += the products of 32 outputs of kRows rows of grad_y and of kDotInputs rows of weights, both (., O).
template <int kRows>
SPARSEKERN_PAIRS_INLINE void add_dots(const bf16* grad_y, const bf16* weights, int64_t O, __mmask32 mask,
                                      __m512 (&sum)[kRows][kDotInputs]) {
  __m512bh w[kDotInputs];
#pragma GCC unroll 4
  for (int i = 0; i < kDotInputs; i++) w[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, weights + i * O);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
    const __m512bh g = (__m512bh)_mm512_maskz_loadu_epi16(mask, grad_y + r * O);
#pragma GCC unroll 4
    for (int i = 0; i < kDotInputs; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], g, w[i]);
  }
}

// grad_x (kRows, .; stride I) at the first `inputs` of kDotInputs inputs, whose weights (., O) are laid out; zero where x is
// zero, if x is not null.
template <int kRows>
SPARSEKERN_PAIRS void dot_pairs(const bf16* grad_y, const bf16* weights, int64_t O, const bf16* x, bf16* grad_x, int64_t I,
                                int64_t inputs) {
  __m512 sum[kRows][kDotInputs] = {};
  int64_t o = 0;
  for (; o + 32 <= O; o += 32) add_dots<kRows>(grad_y + o, weights + o, O, ~__mmask32(0), sum);
  if (o < O) add_dots<kRows>(grad_y + o, weights + o, O, (__mmask32(1) << (O - o)) - 1, sum);
  const __mmask8 wanted = __mmask8((1 << inputs) - 1);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
    __m128i narrow = (__m128i)_mm_cvtneps_pbh(lane_sums(sum[r]));
    if (x != nullptr) {
      const __m128i where = _mm_maskz_loadu_epi16(wanted, x + r * I);
      narrow = _mm_maskz_mov_epi16(_mm_test_epi16_mask(where, _mm_set1_epi16(0x7fff)), narrow);
    }
    _mm_mask_storeu_epi16(grad_x + r * I, wanted, narrow);
  }
}

// Inputs [first, last) of grad_y W for rows [begin, end), zero where x is zero if at_nonzeros. Neighbouring outputs are pairs
// as they lie: a few inputs' weights are laid out in the first-level cache for all rows.
inline void grad_input_pairs(const LinearSupport& w, const bf16* grad_y, const bf16* x, const bf16* weight, bf16* grad_x,
                             bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
  constexpr int64_t kInputs = 2 * kDotInputs;
  const int64_t O = w.outputs;
  const bool full = w.ccol[w.inputs] * w.group == w.inputs * O; // stored they are laid out
  bf16* tile = (bf16*)scratch(kTiles, size_t(kInputs * O) * sizeof(bf16));
  for (int64_t i = first; i < last; i += kInputs) {
    const int64_t inputs = min(kInputs, last - i);
    const bf16* weights = full && inputs == kInputs ? weight + i * O : tile;
    if (weights == tile) {
      lay_out<true>(w, const_cast<bf16*>(weight), tile, i, i + inputs, 0, O);
      std::memset((void*)(tile + inputs * O), 0, size_t((kInputs - inputs) * O) * sizeof(bf16));
    }
    for_rows(end - begin, [&]<int kRows>(int64_t r) {
      const int64_t row = begin + r;
      for (int64_t n = 0; n < inputs; n += kDotInputs) {
        const int64_t at = row * w.inputs + i + n;
        dot_pairs<kRows>(grad_y + row * O, weights + n * O, O, at_nonzeros ? x + at : nullptr, grad_x + at, w.inputs,
                         min(kDotInputs, inputs - n));
      }
    });
  }
}

// To `to` sixteen columns, or the first `columns` of them, of rows 2p and 2p + 1 of a (B, n) matrix as pairs; zeros beyond.
inline void store_pairs(uint32_t* to, const bf16* x, int64_t n, int64_t B, int64_t p, int64_t columns) {
  const __mmask16 mask = columns >= kLanes ? 0xffff : columns <= 0 ? 0 : __mmask16((1u << columns) - 1);
  const bf16* at = x + 2 * p * n;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(2 * p + 1 < B ? mask : __mmask16(0), at + n));
  _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Pairs of samples: tiles (panels, ceil(B / 2), kPanel) of grad_y (B, O), zeros beyond. Panels [begin, end).
inline void pair_rows(const bf16* grad_y, int64_t B, int64_t O, uint32_t* tiles, int64_t begin, int64_t end) {
  const int64_t pairs = (B + 1) / 2;
  uint32_t* to = tiles + begin * pairs * kPanel;
  for (int64_t c = begin; c < end; c++)
    for (int64_t p = 0; p < pairs; p++, to += kPanel)
      for (int64_t v = 0, o = c * kPanel; v < kPanel; v += kLanes, o += kLanes)
        store_pairs(to + v, grad_y + o, O, B, p, O - o);
}

// The stored weights of kRows inputs from i on, which are slots from s on, at the 64 outputs of a word: the sums over `pairs`
// of x, one input beside the other, times a tile, in registers. outputs: those that there are; infinite times zero is NaN.
template <int64_t kPairStep, int kRows>
SPARSEKERN_PAIRS void put_pairs(const uint32_t* x, const uint32_t* tile, int64_t pairs, uint64_t outputs, int64_t s, int64_t i,
                                int64_t word, WeightWords& words, bf16* grad) {
  __m512 sum[kRows][4] = {};
  for (int64_t p = 0; p < pairs; p++, tile += kPanel, x += kPairStep) {
    __m512bh g[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) g[v] = (__m512bh)_mm512_load_si512(tile + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(int32_t(x[r]));
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, g[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r++) {
    const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(sum[r][1], sum[r][0]);
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(sum[r][3], sum[r][2]);
    words.put(s + r, i + r, word, _mm512_maskz_mov_epi16(__mmask32(outputs), low),
              _mm512_maskz_mov_epi16(__mmask32(outputs >> 32), high), grad);
  }
}

// The stored weights of inputs [begin, end) of grad_y^T x, from the tiles of grad_y.
inline void grad_weight_pairs(const LinearSupport& w, const uint32_t* tiles, const bf16* x, bf16* grad, int64_t B,
                              int64_t begin, int64_t end) {
  constexpr int64_t kInputs = 8 * kTileSums;
  const int64_t pairs = (B + 1) / 2, outputs = (w.outputs + w.group - 1) / w.group * w.group;
  uint32_t* part = (uint32_t*)scratch(kLists, size_t(pairs * kInputs) * 4);
  WeightWords words(w, grad, kInputs, outputs);
  for (int64_t i = begin; i < end; i += kInputs) {
    const int64_t inputs = min(kInputs, end - i);
    for (int64_t p = 0; p < pairs; p++)
      for (int64_t k = 0; k < kInputs; k += kLanes)
        store_pairs(part + p * kInputs + k, x + i + k, w.inputs, B, p, inputs - k);
    for (int64_t k = 0; k < inputs; k++) words.start(k, i + k, 0);
    for (int64_t c = 0; c * kPanel < outputs; c++) {
      const int64_t left = w.outputs - c * kPanel;
      const uint64_t there = left >= 64 ? ~uint64_t(0) : left <= 0 ? 0 : (uint64_t(1) << left) - 1;
      for_rows(inputs, [&]<int kRows>(int64_t k) {
        put_pairs<kInputs, kRows>(part + k, tiles + c * pairs * kPanel, pairs, there, k, i + k, c, words, grad);
      });
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
