"""``python -m sparsekern.info``: versions, instruction set, devices, and which bodies serve, and why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform

import torch

import sparsekern
from sparsekern.ops import _library

OPS = ("k_winners", "sparse_linear", "sparse_conv2d")


def info() -> dict[str, str]:
    """What the command prints, by name."""
    C, threads = _library._C, torch.get_num_threads()
    lines = {
        "sparsekern": sparsekern.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {threads} thread{'s' if threads != 1 else ''}",
        "processor": f"{platform.machine()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
    }
    if C is None:
        lines["cpu bodies"] = f"reference bodies, since the kernels are not there: {_library._C_error}"
    else:
        why = "set by ATEN_CPU_CAPABILITY" if "ATEN_CPU_CAPABILITY" in os.environ else "the best that both sides have"
        lines["cpu bodies"] = f"C++ kernels, {C.instruction_set()} ({why}), for {', '.join(OPS)}"
        lines["built with"] = f"{C.compiler}, torch {C.built_with_torch} (stable ABI of 2.11), {C.build_type}"
    if torch.cuda.is_available():
        lines["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        lines["gpu"] = "none that PyTorch can use"
    served = [op for op in OPS if importlib.util.find_spec(f"sparsekern.ops.{op}_triton")]
    if _library.has_triton():
        lines["gpu bodies"] = f"Triton kernels for {', '.join(served)} (float64: reference bodies)"
    else:
        why = "Triton is not installed" if torch.version.hip is None else "the Triton kernels are for NVIDIA GPUs"
        lines["gpu bodies"] = f"reference bodies, since {why}"
    lines["triton"] = _triton_version()
    return lines


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed (not required)"
    return importlib.import_module("triton").__version__  # its distribution goes by several names


def main() -> None:
    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name.ljust(width)}  {value}")


if __name__ == "__main__":
    main()
