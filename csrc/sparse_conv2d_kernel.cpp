// Forward and input gradient of the sparse-input convolution: each non-zero adds its weights to the outputs it reaches.
// The innermost kernel keeps a segment of one output row times 16 channels in registers and walks over the pixels of one
// input row, for some taps of one kernel row, so that their weights (channels x taps x 16) stay in L1.
#include "sparse_conv2d_pack.h"

#include "sparse_conv2d_grad_weight.h"

namespace sparsekern {
namespace {

int64_t count(DType dtype, const void* data, int64_t n) {
  int64_t total = 0;
  dispatch(dtype, [&]<class T>() {
    const T* x = static_cast<const T*>(data);
    for (int64_t i = 0; i < n; i++) total += to_acc(x[i]) != 0;
  });
  return total;
}

void keep(DType dtype, const void* mask, void* data, int64_t n) {
  dispatch(dtype, [&]<class T>() {
    const T* m = static_cast<const T*>(mask);
    T* x = static_cast<T*>(data);
    for (int64_t i = 0; i < n; i++) x[i] = to_acc(m[i]) != 0 ? x[i] : T{};
  });
}

int64_t panels(const Conv2d& conv, bool transposed) { return make_plan(conv, transposed).panels(); }

size_t packed_bytes(const Conv2d& conv, bool transposed) {
  const Plan plan = make_plan(conv, transposed);
  return size_t(plan.panels() * plan.panel_size()) * (conv.dtype == DType::f64 ? 8 : 4);
}

void pack(const Conv2d& conv, bool transposed, const void* weight, bool channels_last, void* packed,
          int64_t first_panel, int64_t panels) {
  const Plan plan = make_plan(conv, transposed);
  const Places places(plan);
  int64_t* list = static_cast<int64_t*>(scratch(1, size_t(conv.C * conv.KH * conv.KW) * sizeof(int64_t)));
  dispatch(conv.dtype, [&]<class T>() {
    const int64_t end = min((first_panel + panels) * plan.lanes, plan.result.channels);
    for (int64_t first = first_panel * plan.lanes; first < end; first += kLanes)
      pack_panel(conv, plan, places, static_cast<const T*>(weight), channels_last, first, list,
                 static_cast<acc_t<T>*>(packed));
  });
}

// Adds one slice of the weights, of kernel row kh, to the sums of one sample. start: of the slice's block of channels.
template <class A>
void add_slice(const Conv2d& conv, const Plan& plan, int64_t kh, const Group& group, const Lists<A>& lists,
               const int32_t* start, const A* weight, A* sums) {
  const row_fn<A> add_row = find_row<A>(plan.lanes, plan.segment, group.taps);
  for (int64_t row = 0; row < plan.result.rows; row++) {
    const int64_t source_row = plan.source_row(conv, row, kh);
    if (source_row < 0 || source_row >= plan.source.rows) continue;
    const int32_t* from = start + source_row * plan.pitch + group.column;
    A* to = sums + (row * plan.phase_count + group.phase) * plan.width * plan.lanes;
    for (int64_t i = 0; i < plan.width; i += plan.segment)
      add_row(lists.value, lists.channel, from + i * plan.step, plan.step, weight, to + i * plan.lanes);
  }
}

// Scratch of the calling thread for a few samples at a time.
template <class T> struct Workspace {
  using A = acc_t<T>;
  int64_t at_once, size, starts, sums_size;
  A* values;
  uint16_t* channels;
  int32_t* start;
  A* sums;
  int32_t* place; // of the result's columns in a row of sums
  T* image;       // a source sample with its channels last

  // As many samples at a time as let a slice of weights be read from L2 rarely and the lists stay in L2.
  explicit Workspace(const Plan& plan)
      : at_once(max(1, min(8, 131072 / max(plan.source.size(), 1)))), size(plan.source.size() + kLanes),
        starts(plan.blocks() * plan.source.rows * plan.pitch),
        sums_size(plan.result.rows * plan.phase_count * plan.width * plan.lanes),
        values(static_cast<A*>(scratch(1, size_t(at_once * size) * sizeof(A)))),
        channels(static_cast<uint16_t*>(scratch(2, size_t(at_once * size) * sizeof(uint16_t)))),
        start(static_cast<int32_t*>(scratch(3, size_t(at_once * starts) * sizeof(int32_t)))),
        sums(static_cast<A*>(scratch(4, size_t(at_once * sums_size) * sizeof(A)))),
        place(static_cast<int32_t*>(scratch(5, size_t(plan.result.columns) * sizeof(int32_t)))),
        image(static_cast<T*>(scratch(6, size_t(size) * sizeof(T)))) {
    for (int64_t p = 0; p < plan.phase_count; p++)
      for (int64_t i = 0; i < plan.phases[p].count; i++)
        place[plan.phases[p].first + i * plan.phase_count] = int32_t((p * plan.width + i) * plan.lanes);
  }
  Lists<A> lists(int64_t b) const { return {values + b * size, channels + b * size, start + b * starts}; }
};

// One panel's sums of some samples: slice by slice, each for all of them while it is in the first-level cache.
template <class T>
void add_panel(const Conv2d& conv, const Plan& plan, const Workspace<T>& space, int64_t samples,
               const acc_t<T>* packed) {
  for (int64_t kh = 0; kh < conv.KH; kh++)
    for (int g = 0; g < plan.group_count; g++)
      for (int64_t block = 0; block < plan.blocks(); block++) {
        const Group& group = plan.groups[g];
        const acc_t<T>* weight = packed + plan.slice(0, kh, g) + block * plan.block * group.taps * plan.lanes;
        for (int64_t b = 0; b < samples; b++) {
          const auto lists = space.lists(b);
          add_slice(conv, plan, kh, group, lists, lists.start + block * plan.source.rows * plan.pitch, weight,
                    space.sums + b * space.sums_size);
        }
      }
}

template <class T>
void run(const Conv2d& conv, const Plan& plan, Images source, const acc_t<T>* packed, const T* bias, const T* mask,
         Images result, Part part) {
  using A = acc_t<T>;
  const Workspace<T> space(plan);
  const int64_t end = part.first_sample + part.samples, source_size = plan.source.size();
  for (int64_t b0 = part.first_sample; b0 < end; b0 += space.at_once) {
    const int64_t samples = min(space.at_once, end - b0);
    for (int64_t b = 0; b < samples; b++) {
      const T* x = static_cast<const T*>(source.data) + (b0 + b) * source_size;
      compress(channels_last(x, plan.source, space.image), plan.source, plan.block, plan.pad, plan.pitch, space.lists(b));
    }
    for (int64_t panel = part.first_panel; panel < part.first_panel + part.panels; panel++) {
      std::memset(space.sums, 0, size_t(samples * space.sums_size) * sizeof(A));
      add_panel(conv, plan, space, samples, packed + panel * plan.panel_size());
      const int64_t first = panel * plan.lanes, channels = min(plan.lanes, plan.result.channels - first);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const vec<A> start = bias == nullptr ? vec<A>{} : load_first(bias + first + c, min(kLanes, channels - c));
        for (int64_t b = 0; b < samples; b++) {
          const int64_t at = (b0 + b) * plan.result.size();
          finish(plan, space.place, space.sums + b * space.sums_size + c, start, mask == nullptr ? nullptr : mask + at,
                 static_cast<T*>(result.data) + at, first + c);
        }
      }
    }
  }
}

void forward(const Conv2d& conv, Images x, const void* packed, const void* bias, Images y, Part part) {
  Plan plan = make_plan(conv, false);
  plan.source = View(conv.C, conv.H, conv.W, x.channels_last);
  plan.result = View(conv.O, conv.OH, conv.OW, y.channels_last);
  dispatch(conv.dtype, [&]<class T>() {
    run<T>(conv, plan, x, static_cast<const acc_t<T>*>(packed), static_cast<const T*>(bias), nullptr, y, part);
  });
}

void grad_input(const Conv2d& conv, Images grad_y, const void* packed, const void* mask, Images grad_x, Part part) {
  Plan plan = make_plan(conv, true);
  plan.source = View(conv.O, conv.OH, conv.OW, grad_y.channels_last);
  plan.result = View(conv.C, conv.H, conv.W, grad_x.channels_last);
  dispatch(conv.dtype, [&]<class T>() {
    run<T>(conv, plan, grad_y, static_cast<const acc_t<T>*>(packed), nullptr, static_cast<const T*>(mask), grad_x, part);
  });
}

} // namespace

extern const SparseConv2dKernels SPARSEKERN_TABLE(sparse_conv2d) = {
    count, keep, panels, packed_bytes, pack, forward, grad_input, grad_weight_by_grad, grad_weight_by_input};

} // namespace sparsekern
