#include "sparse_linear.h"

#include "sparse_linear_blocks.h"
#include "sparse_linear_dots.h"
#include "sparse_linear_gradients.h"
#include "sparse_linear_groups.h"
#include "sparse_linear_lanes.h"
#include "sparse_linear_layout.h"
#include "sparse_linear_pairs.h"
#include "sparse_linear_panels.h"
#include "sparse_linear_plan.h"

namespace sparsekern {
namespace {

template <class T> int64_t padded_outputs(const LinearSupport& w) {
  return (w.outputs + w.group - 1) / w.group * w.group + 64;
}

// sums[outputs of the block] += a * block, for each block of input i.
template <class T>
SPARSEKERN_INLINE void add_input(const LinearSupport& w, const T* weight, int64_t i, acc_t<T> a, acc_t<T>* sums) {
  const int64_t G = w.group, end = w.ccol[i + 1];
  if (G == 1) {
    // Four at a time: the outputs of an input differ, so that no sum waits for another.
    int64_t b = w.ccol[i];
    for (; b + 4 <= end; b += 4) {
      const int32_t* o = w.rows + b;
      const acc_t<T> s0 = sums[o[0]] + a * to_acc(weight[b]), s1 = sums[o[1]] + a * to_acc(weight[b + 1]);
      const acc_t<T> s2 = sums[o[2]] + a * to_acc(weight[b + 2]), s3 = sums[o[3]] + a * to_acc(weight[b + 3]);
      sums[o[0]] = s0, sums[o[1]] = s1, sums[o[2]] = s2, sums[o[3]] = s3;
    }
    for (; b < end; b++) sums[w.rows[b]] += a * to_acc(weight[b]);
  } else {
    for (int64_t b = w.ccol[i]; b < end; b++)
      for (int64_t g = 0; g < G; g++) sums[w.rows[b] * G + g] += a * to_acc(weight[b * G + g]);
  }
}

template <class T>
void forward(const LinearSupport& w, const T* x, const T* weight, const T* bias, T* y, int64_t begin, int64_t end) {
  if (w.group % kLanes == 0) return forward_blocks(w, x, weight, bias, y, begin, end);
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, room = padded_outputs<T>(w);
  A* value = (A*)scratch(kValues, size_t(I + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(I + kLanes) * 4);
  A* sums = (A*)scratch(kSums, size_t(room) * sizeof(A));
  // By the bitmap sixteen outputs take 3.5 cycles on Zen 4, 4.5 in two bytes, by the indices each weight 2.3.
  const bool bits = has_bits<T>(w) && int64_t(w.ccol[I]) * (sizeof(T) == 2 ? 8 : 11) > I * O;
  const PaddedWeights<T> weights(w, weight, bits);
  for (int64_t b = begin; b < end; b++) {
    const int64_t active = compress(x + b * I, I, value, index);
    for (int64_t o = 0; o < O; o++) sums[o] = bias ? to_acc(bias[o]) : A(0);
    for (int64_t o = O; o < room; o++) sums[o] = 0;
    if (bits) forward_bits(w, weights, active, value, index, sums);
    else
      for (int64_t p = 0; p < active; p++) add_input(w, weight, index[p], value[p], sums);
    for (int64_t o = 0; o < O; o++) from_acc(sums[o], y[b * O + o]);
  }
}

// The sum over the blocks of input i of block times grad_y at its outputs.
template <class T>
SPARSEKERN_INLINE acc_t<T> dot_input(const LinearSupport& w, const T* weight, int64_t i, const acc_t<T>* grad_y) {
  using A = acc_t<T>;
  const int64_t G = w.group, end = w.ccol[i + 1];
  A total = 0;
  if (G == 1) {
    for (int64_t b = w.ccol[i]; b < end; b++) total += to_acc(weight[b]) * grad_y[w.rows[b]];
  } else {
    for (int64_t b = w.ccol[i]; b < end; b++)
      for (int64_t g = 0; g < G; g++) total += to_acc(weight[b * G + g]) * grad_y[w.rows[b] * G + g];
  }
  return total;
}

template <class T>
void grad_input(const LinearSupport& w, const T* grad_y, const T* x, const T* weight, T* grad_x, bool at_nonzeros,
                int64_t begin, int64_t end) {
  if (w.group % kLanes == 0) return grad_input_blocks(w, grad_y, x, weight, grad_x, at_nonzeros, begin, end);
  using A = acc_t<T>;
  const int64_t I = w.inputs, O = w.outputs, room = padded_outputs<T>(w);
  A* gy = (A*)scratch(kSums, size_t(room) * sizeof(A));
  A* value = (A*)scratch(kValues, size_t(I + kLanes) * sizeof(A));
  int32_t* index = (int32_t*)scratch(kIndices, size_t(I + kLanes) * 4);
  for (int64_t i = 0; !at_nonzeros && i < I; i++) index[i] = int32_t(i);
  // By the bitmap sixteen outputs take 4 cycles on Zen 4, by the indices each weight 3.
  const bool bits = has_bits<T>(w) && int64_t(w.ccol[I]) * 12 > I * O;
  const PaddedWeights<T> weights(w, weight, bits);
  for (int64_t b = begin; b < end; b++) {
    for (int64_t o = 0; o < O; o++) gy[o] = to_acc(grad_y[b * O + o]);
    for (int64_t o = O; o < room; o++) gy[o] = 0;
    T* out = grad_x + b * I;
    if (at_nonzeros) std::memset((void*)out, 0, size_t(I) * sizeof(T));
    const int64_t wanted = at_nonzeros ? compress(x + b * I, I, value, index) : I;
    int64_t p = 0;
    for (; bits && p + 4 <= wanted; p += 4) dot_inputs<4>(w, weights, index + p, gy, out);
    for (; bits && p < wanted; p++) dot_inputs<1>(w, weights, index + p, gy, out);
    for (; p < wanted; p++) from_acc(dot_input(w, weight, index[p], gy), out[index[p]]);
  }
}

// The rows in which each of `count` neighbouring inputs is not zero: sample and value (count, B), samples (count,).
template <class T>
void gather_samples(const T* x, int64_t I, int64_t B, int64_t count, int64_t* samples, int32_t* sample,
                    acc_t<T>* value) {
  for (int64_t i = 0; i < count; i++) samples[i] = 0;
  for (int64_t s = 0; s < B; s++)
    for (int64_t i = 0; i < count; i++) {
      const acc_t<T> v = to_acc(x[s * I + i]);
      value[i * B + samples[i]] = v;
      sample[i * B + samples[i]] = int32_t(s);
      samples[i] += v != 0;
    }
}

// One row, by the bitmap: grad_y times an input, at the input's outputs.
template <class T>
void grad_weight_of_row(const LinearSupport& w, const T* grad_y, const T* x, T* grad, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t O = w.outputs, words = bit_words(w), last = w.ccol[end];
  A* gy = (A*)scratch(kSums, size_t(words * 64) * sizeof(A));
  for (int64_t o = 0; o < words * 64; o += kLanes) store(gy + o, o < O ? load_first(grad_y + o, O - o) : vec<A>{});
  for (int64_t i = begin; i < end; i++) {
    const vec<A> value = splat(to_acc(x[i]));
    int64_t to = w.ccol[i];
    if (to_acc(x[i]) == 0) {
      for (; to < w.ccol[i + 1]; to++) grad[to] = T{};
      continue;
    }
    for (int64_t k = 0; k < words; k++) {
      vec<A> product[4];
      for (int v = 0; v < 4; v++) product[v] = value * load(gy + k * 64 + v * kLanes);
      to = pack_word(w.bits[i * words + k], product, grad, to, last);
    }
  }
}

template <class T>
void grad_weight(const LinearSupport& w, const T* grad_y, const T* x, T* grad, int64_t B, int64_t begin, int64_t end) {
  if (w.group % kLanes == 0) return grad_weight_blocks(w, grad_y, x, grad, B, begin, end);
  if (B == 1 && has_bits<T>(w)) return grad_weight_of_row(w, grad_y, x, grad, begin, end);
  using A = acc_t<T>;
  constexpr int64_t kTile = 16;
  const int64_t I = w.inputs, O = w.outputs, G = w.group;
  if (B == 0) {
    for (int64_t e = w.ccol[begin] * G; e < w.ccol[end] * G; e++) from_acc(A(0), grad[e]);
    return;
  }
  A* value = (A*)scratch(kValues, size_t(kTile * B) * sizeof(A));
  int32_t* sample = (int32_t*)scratch(kSamples, size_t(kTile * B) * 4);
  A* sums = (A*)scratch(kSums, size_t(padded_outputs<T>(w)) * sizeof(A));
  int64_t samples[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t count = end - tile < kTile ? end - tile : kTile;
    gather_samples(x + tile, I, B, count, samples, sample, value);
    for (int64_t t = 0; t < count; t++) {
      const int64_t first = w.ccol[tile + t], blocks = w.ccol[tile + t + 1] - first;
      for (int64_t e = 0; e < blocks * G; e++) sums[e] = 0;
      for (int64_t p = 0; p < samples[t]; p++) {
        const T* gy = grad_y + sample[t * B + p] * O;
        const A v = value[t * B + p];
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t o = w.rows[first + b] * G, lanes = O - o < G ? O - o : G;
          for (int64_t g = 0; g < lanes; g++) sums[b * G + g] += v * to_acc(gy[o + g]);
        }
      }
      for (int64_t e = 0; e < blocks * G; e++) from_acc(sums[e], grad[first * G + e]);
    }
  }
}

// By whole vectors: which elements are zero cannot be foreseen.
template <class T> void clear_at_zeros(const T* x, T* grad, int64_t n) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; i += kLanes)
    store_first(grad + i, load_first(x + i, n - i) != 0 ? load_first(grad + i, n - i) : vec<A>{}, n - i);
}

} // namespace

const SparseLinearKernels SPARSEKERN_TABLE(sparse_linear) = {
    .forward =
        [](DType dtype, const LinearSupport& w, const void* x, const void* weight, const void* bias, void* y,
           int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            forward<T>(w, (const T*)x, (const T*)weight, (const T*)bias, (T*)y, begin, end);
          });
        },
    .grad_input =
        [](DType dtype, const LinearSupport& w, const void* grad_y, const void* x, const void* weight, void* grad_x,
           bool at_nonzeros, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            grad_input<T>(w, (const T*)grad_y, (const T*)x, (const T*)weight, (T*)grad_x, at_nonzeros, begin, end);
          });
        },
    .grad_weight =
        [](DType dtype, const LinearSupport& w, const void* grad_y, const void* x, void* grad, int64_t B,
           int64_t begin, int64_t end) {
          dispatch(dtype,
                   [&]<class T>() { grad_weight<T>(w, (const T*)grad_y, (const T*)x, (T*)grad, B, begin, end); });
        },
    .forward_panels =
        [](DType dtype, const LinearSupport& w, const void* x, const void* weight, const void* bias, bool all, void* y,
           int64_t begin, int64_t end, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            forward_panels<T>(w, (const T*)x, (const T*)weight, (const T*)bias, all, (T*)y, begin, end, first, last);
          });
        },
    .order_weights =
        [](DType dtype, const LinearPlan& plan, const void* weight, void* ordered, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            for (int64_t k = begin; k < end; k++) ((acc_t<T>*)ordered)[k] = to_acc(((const T*)weight)[plan.source[k]]);
          });
        },
    .forward_lanes =
        [](DType dtype, const LinearPlan& plan, const void* x, const void* ordered, const void* bias, void* y,
           int64_t begin, int64_t end, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            const auto weight = (const acc_t<T>*)ordered;
            forward_lanes<T>(plan, (const T*)x, weight, (const T*)bias, (T*)y, begin, end, first, last);
          });
        },
    .forward_groups =
        [](DType dtype, const LinearSupport& w, const LinearGroups& groups, const void* x, const void* weight, const void* bias,
           void* y, int64_t begin, int64_t end, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            forward_groups(w, groups, (const T*)x, (const T*)weight, (const T*)bias, (T*)y, begin, end, first, last);
          });
        },
    .grad_input_groups =
        [](DType dtype, const LinearSupport& w, const LinearGroups& groups, const void* grad_y, const void* x,
           const void* weight, void* grad_x, bool at_nonzeros, int64_t begin, int64_t end, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            const T *gy = (const T*)grad_y, *at = (const T*)x, *weights = (const T*)weight;
            grad_input_groups(w, groups, gy, at, weights, (T*)grad_x, at_nonzeros, begin, end, first, last);
          });
        },
    .group_samples =
        [](DType dtype, const void* x, int64_t B, int64_t I, void* samples, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() { group_samples((const T*)x, B, I, samples, begin, end); });
        },
    .grad_weight_groups =
        [](DType dtype, const LinearSupport& w, const LinearGroups& groups, const void* grad_y, const void* samples,
           void* grad, int64_t B, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            grad_weight_groups(w, groups, (const T*)grad_y, (const acc_t<T>*)samples, (T*)grad, B, begin, end);
          });
        },
    .grad_input_panels =
        [](DType dtype, const LinearSupport& w, const void* grad_y, const void* x, const void* weight, void* grad_x,
           bool at_nonzeros, bool all, int64_t begin, int64_t end, int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() {
            const T *gy = (const T*)grad_y, *at = (const T*)x, *weights = (const T*)weight;
            T* to = (T*)grad_x;
            switch (all ? GradInput::panels : grad_input_way(w, gy, at, at_nonzeros, begin, end)) {
              case GradInput::panels:
                return grad_input_panels(w, gy, at, weights, to, at_nonzeros, all, begin, end, first, last);
              case GradInput::dots: return grad_input_dots(w, gy, at, weights, to, begin, end, first, last);
              case GradInput::lanes:
                return grad_input_lanes(w, gy, at, weights, to, at_nonzeros, begin, end, first, last);
            }
          });
        },
    .pairs = [] { return has_pairs(); },
    .forward_pairs =
        [](const LinearSupport& w, const void* x, const void* weight, const void* bias, void* y, int64_t begin, int64_t end,
           int64_t first, int64_t last) {
          forward_pairs(w, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)y, begin, end, first, last);
        },
    .grad_input_pairs =
        [](const LinearSupport& w, const void* grad_y, const void* x, const void* weight, void* grad_x, bool at_nonzeros,
           int64_t begin, int64_t end, int64_t first, int64_t last) {
          grad_input_pairs(w, (const bf16*)grad_y, (const bf16*)x, (const bf16*)weight, (bf16*)grad_x, at_nonzeros, begin, end,
                           first, last);
        },
    .pair_rows =
        [](const void* grad_y, int64_t B, int64_t O, void* tiles, int64_t begin, int64_t end) {
          pair_rows((const bf16*)grad_y, B, O, (uint32_t*)tiles, begin, end);
        },
    .grad_weight_pairs =
        [](const LinearSupport& w, const void* tiles, const void* x, void* grad, int64_t B, int64_t begin, int64_t end) {
          grad_weight_pairs(w, (const uint32_t*)tiles, (const bf16*)x, (bf16*)grad, B, begin, end);
        },
    .tiles_bytes =
        [](DType dtype, int64_t B, int64_t O) {
          size_t bytes = 0;
          dispatch(dtype, [&]<class T>() {
            using A = acc_t<T>;
            bytes = size_t(round_up(B, kTileRows<A>) * round_up(O, kPanel)) * sizeof(A);
          });
          return bytes;
        },
    .tile_rows =
        [](DType dtype, const void* grad_y, int64_t O, void* tiles, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() { tile_rows<T>((const T*)grad_y, O, (acc_t<T>*)tiles, begin, end); });
        },
    .grad_weight_panels =
        [](DType dtype, const LinearSupport& w, const void* tiles, const void* x, bool all, void* grad, int64_t B,
           int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            grad_weight_panels<T>(w, (const acc_t<T>*)tiles, (const T*)x, all, (T*)grad, B, begin, end);
          });
        },
    .both_gradients =
        [](DType dtype, const LinearSupport& w, const void* tiles, const void* x, const void* weight, void* grad_x,
           void* grad_weight, int64_t B, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() {
            both_gradients<T>(w, (const acc_t<T>*)tiles, (const T*)x, (const T*)weight, (T*)grad_x, (T*)grad_weight, B, begin,
                              end);
          });
        },
    .count =
        [](DType dtype, const void* x, int64_t n) {
          int64_t nonzeros = 0;
          dispatch(dtype, [&]<class T>() { nonzeros = count<T>((const T*)x, n); });
          return nonzeros;
        },
    .expand =
        [](DType dtype, const LinearSupport& w, const void* weight, void* dense, int64_t begin, int64_t end,
           int64_t first, int64_t last) {
          dispatch(dtype, [&]<class T>() { lay_out<true>(w, (T*)weight, (T*)dense, begin, end, first, last); });
        },
    .collect =
        [](DType dtype, const LinearSupport& w, const void* dense, void* weight, int64_t begin, int64_t end) {
          dispatch(dtype, [&]<class T>() { lay_out<false>(w, (T*)weight, (T*)dense, begin, end, 0, w.outputs); });
        },
    .clear_at_zeros =
        [](DType dtype, const void* x, void* grad, int64_t n) {
          dispatch(dtype, [&]<class T>() { clear_at_zeros<T>((const T*)x, (T*)grad, n); });
        },
};

} // namespace sparsekern
