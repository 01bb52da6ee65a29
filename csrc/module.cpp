// The Python module: instruction set and build information. Importing it registers the CPU bodies of the ops.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sparsekern; importing this registers them with PyTorch's dispatcher.";
  m.def("set_cpu_capability", [](const char* capability) {
    return sparsekern::isa_name(sparsekern::set_isa(capability));
  });
  m.def("instruction_set", [] { return sparsekern::isa_name(sparsekern::isa()); });
  m.attr("compiler") = SPARSEKERN_COMPILER;
  m.attr("build_type") = SPARSEKERN_BUILD_TYPE;
  m.attr("built_with_torch") = TORCH_VERSION;
}
