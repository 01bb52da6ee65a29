// How a convolution is cut into passes over rows, and the kernel of one pass.
#pragma once
#include "sparse_conv2d_lists.h"

namespace sparsekern {
namespace {

// The panels of 16 channels that a pass takes together, and the outputs of a segment: their sums fill the registers,
// beside a broadcast and a weight.
#if defined(__AVX512F__)
template <class A> constexpr int kMaxPanels = sizeof(A) == 4 ? 2 : 1;
template <class A> constexpr int kMaxSegment = sizeof(A) == 4 ? 14 : 6; // of doubles fewer: each costs time to compile
#elif defined(__AVX2__)
template <class A> constexpr int kMaxPanels = 1;
template <class A> constexpr int kMaxSegment = sizeof(A) == 4 ? 6 : 2;
#else
template <class A> constexpr int kMaxPanels = 1;
template <class A> constexpr int kMaxSegment = 2;
#endif
// Most bytes of the weights that one pass reads. 64->64 5x5 on 14x14, 10 % active, Zen 4 (32 KB of first-level cache),
// us a sample: 27.5 at 40 KB and 32 filters, 29.0 at 20 KB and 16 filters, 29.3 at 20 KB, 32 filters and half the channels.
constexpr int64_t kSliceBytes = 40960;

// Taps kw, kw + kw_step, ... of a kernel row; output i of phase `phase` meets tap t at start[column + i + t] of a row.
struct Group {
  int taps;
  int64_t kw, kw_step, column, phase;
};

// Result columns first, first + phase_count, ...: those that the same taps reach.
struct Phase {
  int64_t first, count;
};

// Forward: strides leave one phase of the result, and a group's taps meet columns of the source `step` apart, which its
// lists hold next to each other. Input gradient: the source is grad_y, the result grad_x; column w of grad_x meets only the
// taps kw with w + PW - kw divisible by SW, so that there are SW phases, each a convolution of stride 1 with the taps
// reversed.
struct Plan {
  bool transposed;
  View source{0, 0, 0, false}, result{0, 0, 0, false};
  int64_t KH, step, length, pad, segment, width; // of the source's lists, of the result's rows
  int64_t lanes; // channels of the result in a panel: 16 or 32
  int64_t block; // channels of the source in a pass
  int group_count, phase_count;
  int64_t taps; // over all groups: KW
  Group groups[kMaxKernelWidth];
  Phase phases[kMaxKernelWidth];

  int64_t panels() const { return (result.channels + lanes - 1) / lanes; }
  int64_t pitch() const { return step * length; }
  int64_t blocks() const { return (source.channels + block - 1) / block; }
  int64_t panel_size() const { return KH * taps * source.channels * lanes; }
  // Where the packed weights (panel, kh, group, source channel, tap, lanes) hold a slice.
  int64_t slice(int64_t panel, int64_t kh, int g) const {
    int64_t before = 0;
    for (int i = 0; i < g; i++) before += groups[i].taps;
    return panel * panel_size() + (kh * taps + before) * source.channels * lanes;
  }
  // The source row that kernel row kh brings to a result row; outside the source where there is none.
  int64_t source_row(const Conv2d& conv, int64_t row, int64_t kh) const {
    if (!transposed) return row * conv.SH + kh - conv.PH;
    const int64_t shifted = row + conv.PH - kh;
    return shifted >= 0 && shifted % conv.SH == 0 ? shifted / conv.SH : -1;
  }
};

Plan make_plan(const Conv2d& conv, bool transposed) {
  Plan plan;
  plan.transposed = transposed;
  plan.KH = conv.KH;
  plan.taps = conv.KW;
  plan.source = transposed ? View(conv.O, conv.OH, conv.OW, false) : View(conv.C, conv.H, conv.W, false);
  plan.result = transposed ? View(conv.C, conv.H, conv.W, false) : View(conv.O, conv.OH, conv.OW, false);
  plan.step = transposed ? 1 : conv.SW;
  plan.pad = transposed ? (conv.KW - 1) / conv.SW : conv.PW;
  plan.phase_count = transposed ? int(conv.SW) : 1;
  plan.group_count = 0;
  int64_t columns = 0, last_shift = 0;
  for (int64_t r = 0; r < conv.SW; r++) {
    // Result column m * SW + r - PW, m from `low`, is output m - low of phase r.
    const int64_t low = conv.PW > r ? (conv.PW - r + conv.SW - 1) / conv.SW : 0;
    if (transposed) {
      const int64_t high = conv.W - 1 + conv.PW - r;
      const int64_t count = high < 0 || high / conv.SW < low ? 0 : high / conv.SW - low + 1;
      plan.phases[r] = {low * conv.SW + r - conv.PW, count};
      columns = count > columns ? count : columns;
      last_shift = low > last_shift ? low : last_shift;
    }
    const int64_t taps = r < conv.KW ? (conv.KW - r + conv.SW - 1) / conv.SW : 0;
    const int64_t chunks = (taps + kMaxTaps - 1) / kMaxTaps;
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t first = taps * i / chunks, n = taps * (i + 1) / chunks - first;
      Group& group = plan.groups[plan.group_count++];
      group.taps = int(n);
      group.phase = transposed ? r : 0;
      group.kw = r + conv.SW * (transposed ? first + n - 1 : first);
      group.kw_step = transposed ? -conv.SW : conv.SW;
      group.column = transposed ? plan.pad + low - first - n + 1 : first;
    }
  }
  if (!transposed) {
    plan.phases[0] = {0, conv.OW};
    columns = conv.OW;
  }
  const bool is_double = conv.dtype == DType::f64;
  const int most_panels = is_double ? kMaxPanels<double> : kMaxPanels<float>;
  plan.lanes = (plan.result.channels + kLanes - 1) / kLanes % most_panels == 0 ? most_panels * kLanes : kLanes;
  const int64_t most_taps = min(kMaxTaps, (conv.KW + conv.SW - 1) / conv.SW);
  plan.block = max(1, kSliceBytes / (most_taps * plan.lanes * (is_double ? 8 : 4)) / kLanes) * kLanes;
  const int64_t longest = is_double ? kMaxSegment<double> : kMaxSegment<float>;
  const int64_t segments = (columns + longest - 1) / longest;
  plan.segment = segments == 0 ? 2 : ((columns + segments - 1) / segments + 1) / 2 * 2;
  plan.width = segments * plan.segment;
  const int64_t reach = plan.width + (transposed ? last_shift + plan.pad : (conv.KW + conv.SW - 1) / conv.SW);
  plan.length = max(reach, (plan.pad + plan.source.columns + plan.step - 1) / plan.step) + 2;
  for (int g = 0; g < plan.group_count && !transposed; g++)
    plan.groups[g].column += plan.groups[g].kw % conv.SW * plan.length;
  return plan;
}

template <class A> using row_fn = void (*)(const Entry<A>*, const int32_t*, const A*, A*);

// Column kColumn of the segment: its non-zeros meet the results kColumn - t that exist, kRegs registers each.
template <class A, int kRegs, int kSegment, int kTaps, int kColumn>
SPARSEKERN_INLINE void pass_columns(reg<A> (&results)[kSegment][kRegs], const Entry<A>* entries, const int32_t* start,
                                    const A* weight) {
  if constexpr (kColumn < kSegment + kTaps - 1) {
    const Entry<A>* const end = entries + start[kColumn + 1];
    for (const Entry<A>* entry = entries + start[kColumn]; entry != end; entry++) {
      reg<A> v;
      const A* w = weight + read_entry(*entry, v) * kTaps;
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; t++)
#pragma GCC unroll 8
        for (int r = 0; r < kRegs; r++)
          if (kColumn - t >= 0 && kColumn - t < kSegment)
            results[kColumn - t][r] = fma_reg(v, load_reg(w + (t * kRegs + r) * kRegLanes<A>), results[kColumn - t][r]);
    }
    pass_columns<A, kRegs, kSegment, kTaps, kColumn + 1>(results, entries, start, weight);
  }
}

template <class A, int kRegs, int kSegment, int kTaps>
void pass_row(const Entry<A>* entries, const int32_t* start, const A* weight, A* result) {
  reg<A> results[kSegment][kRegs];
#pragma GCC unroll 32
  for (int i = 0; i < kSegment * kRegs; i++) results[i / kRegs][i % kRegs] = load_reg(result + i * kRegLanes<A>);
  pass_columns<A, kRegs, kSegment, kTaps, 0>(results, entries, start, weight);
#pragma GCC unroll 32
  for (int i = 0; i < kSegment * kRegs; i++) store_reg(result + i * kRegLanes<A>, results[i / kRegs][i % kRegs]);
}

template <class A, int kPanels, int kSegment> row_fn<A> find_row_of(int taps) {
  constexpr int kRegs = kPanels * kLanes / kRegLanes<A>;
  switch (taps) {
    case 1: return pass_row<A, kRegs, kSegment, 1>;
    case 2: return pass_row<A, kRegs, kSegment, 2>;
    case 3: return pass_row<A, kRegs, kSegment, 3>;
    case 4: return pass_row<A, kRegs, kSegment, 4>;
    default: return pass_row<A, kRegs, kSegment, 5>;
  }
}

template <class A, int kSegment = 2> row_fn<A> find_row(int64_t lanes, int64_t segment, int taps) {
  if constexpr (kSegment < kMaxSegment<A>)
    if (segment > kSegment) return find_row<A, kSegment + 2>(lanes, segment, taps);
  return lanes == kLanes ? find_row_of<A, 1, kSegment>(taps)
                         : find_row_of<A, kMaxPanels<A>, kSegment>(taps);
}

} // namespace
} // namespace sparsekern
