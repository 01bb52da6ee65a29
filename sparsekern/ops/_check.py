"""Argument checks that the ops share: each states the op, what it wants and what it got."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_tensor(op: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: wants a tensor for {name}, got {type(t).__name__}")


def is_float_tensor(op: str, name: str, t: Tensor) -> None:
    is_tensor(op, name, t)
    float_dtype(op, name, t.dtype)
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: wants {name} as an ordinary (strided) tensor, got one of layout {t.layout}")


def float_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{op}: wants {name} in float32, float64, bfloat16 or float16, got {dtype}")


def same(op: str, x: Tensor, **others: Tensor | None) -> None:
    """All tensors on x's device and of x's dtype."""
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{op}: wants all tensors on one device, got x on {x.device} and {name} on {t.device}")
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: wants {name} in the dtype of x ({x.dtype}), got {t.dtype}")


def shape(op: str, name: str, t: Tensor, wanted: tuple[int, ...]) -> None:
    is_tensor(op, name, t)
    if tuple(t.shape) != wanted:
        raise ValueError(f"{op}: wants {name} of shape {wanted}, got {tuple(t.shape)}")


def is_channels_last(x: Tensor) -> bool:
    """Whether x is that in memory; False under vmap, which cannot tell, so that x is made contiguous there."""
    return not are_transforms_active() and x.is_contiguous(memory_format=torch.channels_last)


def has_values(op: str, name: str, t: Tensor) -> None:
    if t.is_meta:
        raise ValueError(f"{op}: wants {name} with values, got it on the meta device")


def integer(op: str, name: str, value: int, low: int, high: int | None = None) -> None:
    bounds = f"at least {low}" if high is None else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: wants an integer {name} {bounds}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{op}: wants {name} {bounds}, got {value}")


def at_least_0(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: wants a number for {name}, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: wants {name} finite and at least 0, got {value}")


def density(op: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: wants a number for density, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{op}: wants density in (0, 1], got {value}")


def autocast(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors cast to the autocast dtype where autocast is on, as the dense layers' are (float64 is left alone).

    Raises where they are not all of one dtype then, or not on one device.
    """
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = (
            t if t is None or t.dtype in (torch.float64, dtype) else t.to(dtype) for t in (x, weight, bias)
        )
    same(op, x, weight=weight, bias=bias)
    return x, weight, bias
