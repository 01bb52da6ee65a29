// Both gradients where the input is not zero, for groups of 16, 32, ... outputs, input by input: the weights of its blocks
// and the sums of their gradient stay in registers while its non-zeros pass. Each meets its sample's row of grad_y, which is
// read once for both.
#pragma once
#include "sparse_linear_panels.h"

namespace sparsekern {
namespace {

// Vectors of sixteen outputs that are taken together.
template <class A> constexpr int kMostVectors = (int)max(1, most_registers(true) / 2 / (kLanes / kRegLanes<A>));

// Vectors of one input's blocks, and its entries: gradient += value * grad_y, and sums += weight * grad_y, whose tile holds
// vector v at place[v]. In the first tile the gradient is new.
template <class T, int kVectors>
void add_vectors(const Entry<acc_t<T>>* entries, int64_t n, const acc_t<T>* tile, const int32_t* place, const T* weight,
                 bool first, acc_t<T>* gradient, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int kEach = kLanes / kRegLanes<A>, kRegs = kVectors * kEach;
  reg<A> w[kRegs], grad[kRegs] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kRegs; i++) w[i] = load_reg(weight + i * kRegLanes<A>);
  if (!first)
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; i++) grad[i] = load_reg(gradient + i * kRegLanes<A>);
  for (int64_t e = 0; e < n; e++) {
    reg<A> v, sum[2] = {}; // two, so that additions wait less for each other
    const A* row = tile + read_entry(entries[e], v);
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; i++) {
      reg<A> gy = load_reg(row + place[i / kEach] + i % kEach * kRegLanes<A>);
      keep_in_register(gy); // GCC would load it for each of its two uses
      grad[i] = fma_reg(v, gy, grad[i]);
      sum[i % 2] = fma_reg(w[i], gy, sum[i % 2]);
    }
    add_sums(sums + e * kEntrySums, sum[0] + sum[1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRegs; i++) store_reg(gradient + i * kRegLanes<A>, grad[i]);
}

template <class T> using vectors_fn = void (*)(const Entry<acc_t<T>>*, int64_t, const acc_t<T>*, const int32_t*, const T*,
                                               bool, acc_t<T>*, acc_t<T>*);
template <class T, int kVectors = kMostVectors<acc_t<T>>> vectors_fn<T> find_vectors(int64_t vectors) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors) return find_vectors<T, kVectors - 1>(vectors);
  return add_vectors<T, kVectors>;
}

// A few inputs at a time, from the tiles of grad_y.
template <class T> class BothGradients {
  using A = acc_t<T>;

 public:
  static constexpr int64_t kInputs = 64;

  BothGradients(const LinearSupport& w, const A* tiles, const T* x, const T* weight, T* grad_x, T* grad_weight, int64_t B)
      : w_(w), tiles_(tiles), x_(x), weight_(weight), grad_x_(grad_x), grad_weight_(grad_weight), B_(B),
        each_(w.group / kLanes), groups_((w.outputs + w.group - 1) / w.group), vectors_((w.outputs + kLanes - 1) / kLanes),
        lists_(allocate_lists<A>(kLists, kInputs, kTileRows<A>)),
        entry_sums_((A*)scratch(kSamples, size_t(kInputs * kTileRows<A> * kEntrySums) * sizeof(A))),
        place_((int32_t*)scratch(kIndices, size_t(vectors_) * sizeof(int32_t))) {
    for (int64_t v = 0; v < vectors_; v++) place_[v] = int32_t(tile_column<A>(v * kLanes));
  }

  void add(int64_t first, int64_t inputs) {
    const int64_t begin = w_.ccol[first], size = (w_.ccol[first + inputs] - begin) * w_.group;
    if constexpr (std::is_same_v<T, A>) sums_ = grad_weight_ + begin * w_.group;
    else sums_ = (A*)scratch(kSums, size_t(size) * sizeof(A));
    for (int64_t row = 0; row < B_; row += kTileRows<A>) {
      const int64_t rows = min(kTileRows<A>, B_ - row);
      fill_transposed_lists(x_ + row * w_.inputs + first, w_.inputs, inputs, rows, kPanel, lists_);
      for (int64_t k = 0; k < inputs; k++) {
        std::memset((void*)sums_of(k), 0, size_t(lists_.end[k] - lists_.start[k]) * kEntrySums * sizeof(A));
        add_input(first + k, k, tiles_ + row * round_up(w_.outputs, kPanel), row == 0,
                  sums_ + (w_.ccol[first + k] - begin) * w_.group);
      }
      write_values(first, inputs, row, rows);
    }
    write_blocks(first, inputs, size);
  }

 private:
  A* sums_of(int64_t k) const { return entry_sums_ + int64_t(lists_.start[k]) * kEntrySums; }

  // How many vectors of an input's blocks begin before the last output.
  int64_t vectors_of(int64_t i) const {
    const int64_t begin = w_.ccol[i], end = w_.ccol[i + 1], beyond = groups_ * each_ - vectors_;
    return (end - begin) * each_ - (end > begin && w_.rows[end - 1] == groups_ - 1 ? beyond : 0);
  }

  // The entries of input i, which are list k.
  void add_input(int64_t i, int64_t k, const A* tile, bool first_tile, A* gradient) {
    const int64_t n = lists_.end[k] - lists_.start[k], block = w_.ccol[i], vectors = vectors_of(i);
    if (n == 0) {
      if (first_tile && vectors > 0) std::memset((void*)gradient, 0, size_t(vectors * kLanes) * sizeof(A));
      return;
    }
    const int64_t parts = (vectors + kMostVectors<A> - 1) / kMostVectors<A>;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t from = vectors * part / parts, count = vectors * (part + 1) / parts - from;
      int32_t place[kMostVectors<A>];
      if (each_ == 1)
        for (int64_t v = 0; v < count; v++) place[v] = place_[w_.rows[block + from + v]];
      else
        for (int64_t v = from; v < from + count; v++)
          place[v - from] = place_[w_.rows[block + v / each_] * each_ + v % each_];
      find_vectors<T>(count)(lists_.entries + lists_.start[k], n, tile, place, weight_ + block * w_.group + from * kLanes,
                             first_tile, gradient + from * kLanes, sums_of(k));
    }
  }

  // The sums of `size` elements of blocks; beyond the last output, where they may be infinite times zero, zeros.
  void write_blocks(int64_t first, int64_t inputs, int64_t size) const {
    const int64_t G = w_.group, begin = w_.ccol[first];
    T* grad = grad_weight_ + begin * G;
    if constexpr (!std::is_same_v<T, A>)
      for (int64_t e = 0; e < size; e += kLanes) store(grad + e, load(sums_ + e));
    const int64_t used = w_.outputs - (groups_ - 1) * G; // of the last group
    for (int64_t i = first; i < first + inputs && used < G; i++) {
      const int64_t last = w_.ccol[i + 1] - 1;
      if (last >= w_.ccol[i] && w_.rows[last] == groups_ - 1)
        std::memset((void*)(grad + (last - begin) * G + used), 0, size_t(G - used) * sizeof(T));
    }
  }

  void write_values(int64_t first, int64_t inputs, int64_t row, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++)
      std::memset((void*)(grad_x_ + (row + r) * w_.inputs + first), 0, size_t(inputs) * sizeof(T));
    for (int64_t k = 0; k < inputs; k++) {
      T* to = grad_x_ + row * w_.inputs + first + k;
      const A* sum = sums_of(k);
      for (int32_t p = lists_.start[k]; p < lists_.end[k]; p++, sum += kEntrySums)
        from_acc((sum[0] + sum[1]) + (sum[2] + sum[3]), to[lists_.entries[p].place / kPanel * w_.inputs]);
    }
  }

  const LinearSupport& w_;
  const A* tiles_;
  const T *x_, *weight_;
  T *grad_x_, *grad_weight_;
  const int64_t B_, each_, groups_, vectors_; // vectors of sixteen outputs: of a group, and in all
  const RowLists<A> lists_;
  A *entry_sums_, *sums_ = nullptr; // kEntrySums of each entry; of the weight's gradient
  int32_t* place_;                  // of each vector in a tile
};

// Columns [begin, end) of grad_x, zero where x is zero, and the blocks of these inputs of grad_weight.
template <class T>
void both_gradients(const LinearSupport& w, const acc_t<T>* tiles, const T* x, const T* weight, T* grad_x, T* grad_weight,
                    int64_t B, int64_t begin, int64_t end) {
  BothGradients<T> both(w, tiles, x, weight, grad_x, grad_weight, B);
  for (int64_t i = begin; i < end; i += both.kInputs) both.add(i, min(both.kInputs, end - i));
}

} // namespace
} // namespace sparsekern
