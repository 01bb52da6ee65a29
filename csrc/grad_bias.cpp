// The gradient of a bias, on the CPU. PyTorch's own sum over rows rounds differently with the number of threads (37 float32
// columns of 1000 rows, for one).
#include "grad_bias_calls.h"

#include <algorithm>

#include "grad_bias.h"
#include "parallel.h"

namespace sparsekern {
namespace {

const GradBiasKernels& kernels() { return SPARSEKERN_SELECT(grad_bias); }

constexpr int64_t kRows = 256;      // of a part: enough that the sums of parts cost nothing
constexpr int64_t kChannels = 1024; // of a task, a multiple of the kernels' block
constexpr int64_t kGrain = 1 << 15; // elements that are worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_channels_last(const Tensor& t) {
  const int64_t O = t.size(1), H = t.size(2), W = t.size(3);
  return t.stride(1) == 1 && t.stride(3) == O && t.stride(2) == O * W && t.stride(0) == O * W * H;
}

} // namespace

// The bounds of parts depend on the shape alone, so that the sums do not depend on the number of threads.
Tensor grad_bias(Tensor grad_y) { // (B, O) or (B, O, H, W)
  const DType dtype = dtype_of("grad_bias", grad_y);
  STD_TORCH_CHECK(grad_y.dim() == 2 || grad_y.dim() == 4, "grad_bias: wants 2 or 4 dimensions, got ", grad_y.dim());
  const bool image = grad_y.dim() == 4;
  if (!grad_y.is_contiguous() && !(image && is_channels_last(grad_y))) grad_y = unstrided(grad_y);
  const bool plain = grad_y.is_contiguous();
  const int64_t O = grad_y.size(1), pixels = image ? grad_y.size(2) * grad_y.size(3) : 1;
  const bool by_rows = !image || !plain || pixels == 1;
  const int64_t rows = grad_y.size(0) * (by_rows ? pixels : 1);
  const int64_t parts = by_rows ? ceil_div(rows, kRows) : rows, ranges = ceil_div(O, kChannels);
  const char* data = static_cast<const char*>(grad_y.data_ptr());
  const int64_t size = int64_t(grad_y.element_size()), step = kernels().accumulator_bytes(dtype);
  char* out = static_cast<char*>(scratch(0, size_t(parts * O * step))); // the sums of parts, (parts, O)
  if (by_rows) {
    const int64_t work = std::min(rows, kRows) * std::min(O, kChannels);
    parallel_items(parts * ranges, ceil_div(kGrain, work + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t part = i / ranges, first = i % ranges * kChannels;
        kernels().rows(dtype, data + part * kRows * O * size, std::min(kRows, rows - part * kRows), O,
                       out + part * O * step, first, std::min(O, first + kChannels));
      }
    });
  } else {
    parallel_items(rows * O, ceil_div(kGrain, pixels + 1), [&](int64_t begin, int64_t end) {
      kernels().neighbours(dtype, data, pixels, out, begin, end);
    });
  }
  Tensor grad = empty(grad_y.scalar_type(), {O});
  parallel_items(ranges, ceil_div(kGrain, parts * kChannels + 1), [&](int64_t begin, int64_t end) {
    kernels().finish(dtype, out, parts, O, grad.data_ptr(), begin * kChannels, std::min(O, end * kChannels));
  });
  return grad;
}

} // namespace sparsekern
