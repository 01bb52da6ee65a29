"""The ``torch.ops.sparsekern`` library: where schemas are defined and bodies are registered."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch.compiler import is_compiling

_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
library = torch.library.Library("sparsekern", "DEF")

try:
    from sparsekern import _C
except ImportError as error:
    _C = None
    _C_error: ImportError | None = error
    warnings.warn(
        f"sparsekern: the CPU kernels are not available ({error}); the reference bodies run instead, "
        "correct but slow. Install a C++ compiler and reinstall sparsekern to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _C_error = None
    _C.set_cpu_capability(torch.backends.cpu.get_cpu_capability())


def unwrap(value):
    """What a functorch transform left behind is replaced by what it wraps."""
    return _unwrap_if_dead(value) if type(value) is Tensor else value


class Function(torch.autograd.Function):
    """An autograd function of positional arguments, called without reading its signature each time (30 us)."""

    generate_vmap_rule = True

    def __init_subclass__(cls):
        cls._apply = super(torch.autograd.Function, cls).apply

    @classmethod
    def apply(cls, *args):
        if are_transforms_active():
            return super().apply(*args)
        return cls._apply(*map(unwrap, args))  # as torch does, in a third of its time


def wanted_only(ctx, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a function's first three inputs, None in place of one that is not wanted."""
    want_x, want_weight, want_bias, *_ = ctx.needs_input_grad
    return grad_x if want_x else None, grad_weight if want_weight else None, grad_bias if want_bias else None


def has_values(t: Tensor | None) -> bool:
    """Whether t is a tensor whose values Python may look at: not while traced or transformed, not on the meta device."""
    return type(t) is Tensor and not t.is_meta and not is_compiling() and not are_transforms_active()


def define(schema: str, *, reference, fake) -> None:
    """Defines an op: its schema, its shape function, and its plain PyTorch body wherever no kernel serves.

    The C++ bodies register themselves for CPU when ``sparsekern._C`` is imported; for CUDA the functions of
    ``ops/*_triton.py`` are registered here. PyTorch's dispatcher picks by device.
    """
    library.define(schema)
    name = schema[: schema.index("(")]
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=library)
    if not has_kernel(name, "CPU"):
        library.impl(name, reference, "CPU")
    library.impl(name, triton_body(reference) if has_triton() else reference, "CUDA")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, for NVIDIA GPUs; finding out does not import it."""
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def triton_body(reference):
    """The function of the same name in the ``*_triton`` module beside reference's, or reference where there is none.

    The module is imported when the function is first called.
    """
    module = reference.__module__.replace("_reference", "_triton")
    if importlib.util.find_spec(module) is None:
        return reference

    @functools.cache
    def load():
        return getattr(importlib.import_module(module), reference.__name__, reference)

    def body(*args):
        return load()(*args)

    body.__name__, body.__module__ = reference.__name__, module
    return body


def has_kernel(name: str, device: str) -> bool:
    """Whether a body is registered for an op and a dispatch key ("CPU", "CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{name}", device)


def instruction_set() -> str | None:
    """What the CPU kernels run on: "baseline", "avx2" or "avx512"; None without them."""
    return None if _C is None else _C.instruction_set()
