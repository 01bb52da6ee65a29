// Passes over some samples at a time, and their scratch.
#pragma once
#include "sparse_conv2d_rows.h"

namespace sparsekern {
namespace {

// x: one sample, channels last. The lists have room for 16 entries more than x has elements.
template <class T> void compress(const T* x, const Plan& plan, const Lists<acc_t<T>>& lists) {
  const View& view = plan.source;
  int32_t n = 0, *start = lists.start;
  for (int64_t first = 0; first < view.channels; first += plan.block) {
    const int64_t channels = min(plan.block, view.channels - first);
    const T* row = x + first;
    for (int64_t r = 0; r < view.rows; r++, row += view.columns * view.channels)
      for (int64_t phase = 0; phase < plan.step; phase++, start += plan.length) {
        int64_t i = max(plan.pad - phase + plan.step - 1, 0) / plan.step; // the first column of the image
        int64_t column = i * plan.step + phase - plan.pad;
        for (int64_t j = 0; j <= i; j++) start[j] = n;
        for (; column < view.columns; column += plan.step, start[++i] = n)
          for (int64_t c = 0; c < channels; c += kLanes)
            n += list_nonzeros(row + column * view.channels + c, min(kLanes, channels - c), c, plan.lanes,
                               lists.entries + n);
        for (i++; i < plan.length; i++) start[i] = n;
      }
  }
}

// One slice of the weights, of kernel row kh, and one sample. start: of the slice's block of channels.
template <class A>
void pass_slice(const Conv2d& conv, const Plan& plan, int64_t kh, const Group& group, const Lists<A>& lists,
                const int32_t* start, const A* weight, A* sums) {
  const row_fn<A> pass_row = find_row<A>(plan.lanes, plan.segment, group.taps);
  for (int64_t row = 0; row < plan.result.rows; row++) {
    const int64_t source_row = plan.source_row(conv, row, kh);
    if (source_row < 0 || source_row >= plan.source.rows) continue;
    const int32_t* from = start + source_row * plan.pitch() + group.column;
    A* to = sums + (row * plan.phase_count + group.phase) * plan.width * plan.lanes;
    for (int64_t i = 0; i < plan.width; i += plan.segment)
      pass_row(lists.entries, from + i, weight, to + i * plan.lanes);
  }
}

// Scratch of the calling thread for a few samples at a time.
template <class T> struct Workspace {
  using A = acc_t<T>;
  int64_t at_once, size, starts, sums_size;
  Entry<A>* entries;
  int32_t* start;
  A* sums;
  int32_t* place; // of the result's columns in a row of sums
  T* image;       // a source sample with its channels last

  // As many samples at a time as let a slice of weights be read from L2 rarely and the lists stay in L2.
  explicit Workspace(const Plan& plan)
      : at_once(max(1, min(8, 131072 / max(plan.source.size(), 1)))), size(plan.source.size() + kLanes),
        starts(plan.blocks() * plan.source.rows * plan.pitch()),
        sums_size(plan.result.rows * plan.phase_count * plan.width * plan.lanes),
        entries(static_cast<Entry<A>*>(scratch(1, size_t(at_once * size) * sizeof(Entry<A>)))),
        start(static_cast<int32_t*>(scratch(3, size_t(at_once * starts) * sizeof(int32_t)))),
        sums(static_cast<A*>(scratch(4, size_t(at_once * sums_size) * sizeof(A)))),
        place(static_cast<int32_t*>(scratch(5, size_t(plan.result.columns) * sizeof(int32_t)))),
        image(static_cast<T*>(scratch(6, size_t(size) * sizeof(T)))) {
    for (int64_t p = 0; p < plan.phase_count; p++)
      for (int64_t i = 0; i < plan.phases[p].count; i++)
        place[plan.phases[p].first + i * plan.phase_count] = int32_t((p * plan.width + i) * plan.lanes);
  }
  Lists<A> lists(int64_t b) const { return {entries + b * size, start + b * starts}; }
};

// Kernel row kh of one panel and some samples: slice by slice, each for all of them while it is in the first-level cache.
template <class T>
void pass_samples(const Conv2d& conv, const Plan& plan, const Workspace<T>& space, int64_t samples, int64_t kh,
                  const acc_t<T>* weight_row) {
  for (int g = 0; g < plan.group_count; g++)
    for (int64_t block = 0; block < plan.blocks(); block++) {
      const Group& group = plan.groups[g];
      const acc_t<T>* weight = weight_row + plan.slice(0, 0, g) + block * plan.block * group.taps * plan.lanes;
      for (int64_t b = 0; b < samples; b++) {
        const auto lists = space.lists(b);
        pass_slice(conv, plan, kh, group, lists, lists.start + block * plan.source.rows * plan.pitch(), weight,
                   space.sums + b * space.sums_size);
      }
    }
}

} // namespace
} // namespace sparsekern
