"""What the Triton bodies share. Triton is optional: only ``*_triton.py`` import this file, and only once they are used."""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys order as their float32 values do: NaN above +inf, both zeros alike. KEY_LOW is what lanes without a unit hold,
# below -inf; KEY_HIGH is above NaN, so that nothing reaches it.
KEY_LOW = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(2**31 - 2)
KEY_HIGH = tl.constexpr(2**31 - 1)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def float_key(value):
    """The order-preserving int32 key of a float32."""
    # Not value + 0.0, which the compiler makes one operation with the product that value is: -0.0 where that underflows.
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value != value, KEY_NAN, key)


@triton.jit
def widen(value):
    """To float32, by bits where the value is bfloat16: Triton's interpreter flushes subnormal numbers there."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """From float32, to nearest even; by bits where dtype is bfloat16: Triton's interpreter truncates there."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr = False):
    """acc + a @ b: float32 as TF32 if asked for; the interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def popcount(bits):
    """The number of bits set in each int32."""
    if INTERPRETED:
        pairs = bits.to(tl.uint32, bitcast=True)
        pairs = pairs - ((pairs >> 1) & 0x55555555)
        pairs = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        pairs = (pairs + (pairs >> 4)) & 0x0F0F0F0F
        return ((pairs + (pairs >> 8) + (pairs >> 16) + (pairs >> 24)) & 0xFF).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)


def allows_tf32(*settings) -> bool:
    """Whether products of float32 may be rounded to TF32, by PyTorch's settings: "none" leaves it to the next one."""
    precisions = (setting.fp32_precision for setting in (*settings, torch.backends))
    return next((precision for precision in precisions if precision != "none"), "ieee") == "tf32"


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def is_gpu(x: Tensor) -> bool:
    """Whether programs run side by side: not under the interpreter, on CPU."""
    return x.is_cuda


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors x's device has; 2 under the interpreter, so that loops over programs' work loop."""
    return _multiprocessors(x.device.index) if is_gpu(x) else 2


def on_device(x: Tensor):
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device_of(x)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
