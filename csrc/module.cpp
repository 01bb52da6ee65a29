// The Python module: instruction set and build information. Importing it registers the CPU bodies of the ops.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "isa.h"
#include "sparse_conv2d.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sparsekern; importing this registers them with PyTorch's dispatcher.";
  m.def("set_cpu_capability", [](const char* capability) {
    return sparsekern::isa_name(sparsekern::set_isa(capability));
  });
  m.def("instruction_set", [] { return sparsekern::isa_name(sparsekern::isa()); });
  // The sizes of x (B, C, H, W), of the weight (O, C, KH, KW), and of stride and padding, in that order.
  m.def("all_dense_conv2d_pays", [](uintptr_t x, bool channels_last, bool bfloat16, bool want_input, int64_t B, int64_t C,
                                    int64_t H, int64_t W, int64_t O, int64_t, int64_t KH, int64_t KW, int64_t SH, int64_t SW,
                                    int64_t PH, int64_t PW) {
    using namespace sparsekern;
    const int64_t OH = (H + 2 * PH - KH) / SH + 1, OW = (W + 2 * PW - KW) / SW + 1;
    const DType dtype = bfloat16 ? DType::bf16 : DType::f32;
    return all_dense_pays({B, C, H, W, O, KH, KW, OH, OW, SH, SW, PH, PW, dtype},
                          {reinterpret_cast<void*>(x), channels_last}, want_input);
  });
  m.attr("compiler") = SPARSEKERN_COMPILER;
  m.attr("build_type") = SPARSEKERN_BUILD_TYPE;
  m.attr("built_with_torch") = TORCH_VERSION;
}
