// Forward and input gradient of the sparse-input convolution: each non-zero adds its weights to the outputs it reaches.
// The innermost kernel keeps a segment of one output row times 16 channels in registers and walks over the pixels of one
// input row, for some taps of one kernel row, so that their weights (channels x taps x 16) stay in L1.
#include "fingerprint.h"
#include "sparse_conv2d_gradients.h"
#include "sparse_conv2d_passes.h"

namespace sparsekern {
namespace {

// Measured on Zen 4, channel by channel on Zen 5: see sparse_conv2d_ways.h.
#if defined(__AVX512F__)
constexpr CostFactors kFactors = {1, 1, 1};
#elif defined(__AVX2__)
constexpr CostFactors kFactors = {1.3, 1.9, 4};
#else
constexpr CostFactors kFactors = {2, 3.6, 4};
#endif

int64_t count(DType dtype, const void* data, int64_t n) {
  int64_t total = 0;
  dispatch(dtype, [&]<class T>() {
    const T* x = static_cast<const T*>(data);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      acc_t<T> values[kLanes];
      store(values, load(x + i));
      total += __builtin_popcount(nonzero_bits(values));
    }
    for (; i < n; i++) total += to_acc(x[i]) != 0;
  });
  return total;
}

void keep(DType dtype, const void* mask, void* x, int64_t n) {
  dispatch(dtype, [&]<class T>() { keep(static_cast<const T*>(mask), static_cast<T*>(x), n); });
}

int64_t panels(const Conv2d& conv, bool transposed) { return make_plan(conv, transposed).panels(); }

size_t packed_bytes(const Conv2d& conv, bool transposed) {
  const Plan plan = make_plan(conv, transposed);
  return size_t(plan.panels() * plan.panel_size()) * (conv.dtype == DType::f64 ? 8 : 4);
}

void pack(const Conv2d& conv, bool transposed, const void* weight, bool channels_last, void* packed,
          int64_t first_panel, int64_t panels) {
  const Plan plan = make_plan(conv, transposed);
  const Places places(plan.groups, plan.group_count, plan.source.channels, plan.lanes);
  int64_t* list = static_cast<int64_t*>(scratch(1, size_t(conv.C * conv.KH * conv.KW) * sizeof(int64_t)));
  dispatch(conv.dtype, [&]<class T>() {
    const int64_t end = min((first_panel + panels) * plan.lanes, plan.result.channels);
    for (int64_t first = first_panel * plan.lanes; first < end; first += kLanes)
      pack_panel(conv, plan, places, static_cast<const T*>(weight), channels_last, first, list,
                 static_cast<acc_t<T>*>(packed));
  });
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
      compress(channels_last(x, plan.source, space.image), plan, space.lists(b));
    }
    for (int64_t panel = part.first_panel; panel < part.first_panel + part.panels; panel++) {
      std::memset(space.sums, 0, size_t(samples * space.sums_size) * sizeof(A));
      for (int64_t kh = 0; kh < conv.KH; kh++)
        pass_samples<T>(conv, plan, space, samples, kh, packed + plan.slice(panel, kh, 0));
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
    kFactors, fingerprint, count, keep, panels, packed_bytes, pack, forward, grad_input, gradients,
    write_grad_weight};

} // namespace sparsekern
