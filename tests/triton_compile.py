"""Compiles for a GPU that is not there what the Triton bodies would launch on it.

The bodies run on meta tensors with the launch itself replaced: what is compiled is exactly what the wrappers ask for, with
the specialisations that Triton makes from the arguments.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
# Bytes: some releases of ptxas spill a few registers at a branch, outside the loops.
ALLOWED_SPILLS = 32
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _argument(value, specialize: bool) -> tuple[str, bool, object]:
    """(type, whether 16 divides it, the value if it is compiled in) as Triton's launcher decides."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], True, None
    if isinstance(value, bool):
        return "u1", False, None
    if isinstance(value, int):
        if value == 1 and specialize:
            return "constexpr", False, 1
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and specialize, None
    return "fp32", False, None


@contextlib.contextmanager
def launches():
    """The list of (kernel, arguments by name, options) that is launched inside, and not run."""
    seen = []

    def record(kernel, *args, grid, warmup, **kwargs):
        assert all(0 < size < 2**31 for size in grid[:1]), f"{kernel.__name__}: grid {grid}"
        assert all(0 < size < 2**16 for size in grid[1:]), f"{kernel.__name__}: grid {grid}"
        named = dict(zip(kernel.arg_names, args, strict=False))
        named.update({name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names})
        seen.append((kernel, named, kwargs))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield seen
    finally:
        JITFunction.run = original


def specialised(kernel, named) -> tuple[dict, dict, dict]:
    """The types of a launch's arguments, what is compiled in, and what 16 divides."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if name in constants:
            kind, divisible, value = "constexpr", False, named[name]
        else:
            kind, divisible, value = _argument(named[name], not parameter.do_not_specialize)
        signature[name] = kind
        if kind == "constexpr":
            constexprs[(i,)] = value
        elif divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def distinct(seen) -> list:
    """The launches of which no two are the same code."""
    found = {}
    for kernel, named, options in seen:
        found.setdefault(str((kernel.__name__, *specialised(kernel, named), options)), (kernel, named, options))
    return list(found.values())


def compile_launch(kernel, named, options, capability):
    """The compiled kernel of one launch."""
    signature, constexprs, attributes = specialised(kernel, named)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def resources(compiled, folder: Path) -> dict[str, int]:
    """Registers a thread, bytes of spills, bytes of shared memory a program."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    printed = _run([BIN / "cuobjdump", "--dump-resource-usage", cubin])
    registers, stack = (int(re.search(rf"{name}:(\d+)", printed).group(1)) for name in ("REG", "STACK"))
    return {
        "registers": registers,
        "spills": _spills(compiled, folder) if stack else 0,
        "shared": compiled.metadata.shared,
    }


def float_atomics(compiled) -> list[str]:
    """The instructions that add floats in an order that no run repeats."""
    atomics = re.findall(r"\b(?:atom|red)\.[\w.:]+", compiled.asm["ptx"])
    return [name for name in atomics if re.search(r"\.b?f\d", name)]


def _spills(compiled, folder: Path) -> int:
    """Bytes of spill stores; a stack frame may also come from calls, of a 64-bit division for instance."""
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    chip = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
    # As Triton's backend runs it; some releases add an option.
    ptxas = nvidia.get_ptxas(compiled.metadata.target.arch).path
    option = "--regAllocOptLevel=2"
    options = [option] if option in Path(nvidia.__file__).read_text() else []
    printed = _run([ptxas, "-v", f"--gpu-name={chip}", *options, ptx, "-o", folder / "again.cubin"])
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", printed)))


def _run(command: list) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
