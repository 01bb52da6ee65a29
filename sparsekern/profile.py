"""Where a model's products and time go: each layer beside the dense layer that it replaces (section 4.3)."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsekern.nn.k_winners import KWinners, KWinners2d
from sparsekern.nn.sparse_conv2d import SparseConv2d
from sparsekern.nn.sparse_linear import SparseLinear

PROFILED = (nn.Linear, nn.Conv2d, SparseLinear, SparseConv2d, KWinners, KWinners2d)


@dataclass
class LayerProfile:
    """One call of one layer.

    Attributes:
        name, kind: the layer's name in the model and its class.
        shape: of its input.
        active: fraction of its input that is not zero.
        dense_products: multiplications of the dense layer.
        products: multiplications whose two factors both exist and are not zero.
        dense_ms, sparse_ms: forward time of the dense counterpart (ReLU for k-winners) and of the layer, median, in
            milliseconds; for a dense layer the two are one measurement.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    active: float
    dense_products: int
    products: int
    dense_ms: float
    sparse_ms: float

    @property
    def savings(self) -> float:
        """dense_products / products; 1 where there are no products."""
        return self.dense_products / self.products if self.products else float(self.dense_products or 1)

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms

    @property
    def realised(self) -> float:
        """speedup / savings."""
        return self.speedup / self.savings


@dataclass
class Profile:
    """What :func:`profile` returns: the layers in the order of their calls; prints as a table."""

    layers: list[LayerProfile] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.layers:
            names = ", ".join(kind.__name__ for kind in PROFILED)
            return f"nothing to profile: the model called none of {names}"
        header = (
            "layer", "kind", "input", "active", "dense products", "products", "savings", "dense ms", "sparse ms",
            "speed-up", "realised",
        )  # fmt: skip
        rows = [header]
        for p in self.layers:
            rows.append(
                (
                    p.name,
                    p.kind,
                    "x".join(map(str, p.shape)),
                    f"{p.active:.3f}",
                    f"{p.dense_products:,}",
                    f"{p.products:,}",
                    f"{p.savings:.1f}x",
                    f"{p.dense_ms:.3f}",
                    f"{p.sparse_ms:.3f}",
                    f"{p.speedup:.2f}x",
                    f"{p.realised:.2f}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@torch.no_grad()
def profile(model: nn.Module, x: Tensor, *, repeats: int = 20, show: bool = True) -> Profile:
    """Runs the model on x once, in eval mode, and measures each layer on the input that it really got.

    Args:
        model: its Linear, Conv2d, SparseLinear, SparseConv2d, KWinners and KWinners2d layers are measured, forward. Mode,
            buffers and parameters are left as they were.
        x: what ``model(x)`` wants.
        repeats: timed calls of each layer, after one that is not timed.
        show: print the table.

    Returns:
        A :class:`Profile`; ``.layers`` holds each layer's products, savings, times, speed-up and realised fraction.

    Raises:
        ValueError: repeats that is not a whole number of at least 1; and whatever ``model(x)`` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"profile: wants an nn.Module, got {type(model).__name__}")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"profile: wants repeats of at least 1, got {repeats!r}")
    calls: list[tuple[str, nn.Module, Tensor]] = []
    inside = {module.conv for module in model.modules() if isinstance(module, KWinners2d)}  # measured with their layer

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        calls.append((name, module, x.detach().clone()))  # later layers may change it in place

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, PROFILED) and module not in inside
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model(x)
        for handle in handles:
            handle.remove()
        handles.clear()
        result = Profile([_profile_layer(name, module, inputs, repeats) for name, module, inputs in calls])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if show:
        print(result)
    return result


def _profile_layer(name: str, module: nn.Module, x: Tensor, repeats: int) -> LayerProfile:
    dense_products, products = _products(module, x)
    dense = _dense_counterpart(module)
    sparse_ms = _median_ms(module, x, repeats)
    return LayerProfile(
        name=name,
        kind=type(module).__name__,
        shape=tuple(x.shape),
        active=float((x != 0).double().mean()) if x.numel() else 0.0,
        dense_products=dense_products,
        products=products,
        dense_ms=sparse_ms if dense is module else _median_ms(dense, x, repeats),
        sparse_ms=sparse_ms,
    )


def _dense_counterpart(module: nn.Module) -> nn.Module:
    if isinstance(module, (KWinners, KWinners2d)):
        before = [_dense_counterpart(part) for name in ("conv", "norm") if (part := getattr(module, name, None))]
        pool = getattr(module, "max_pool", 1)
        return nn.Sequential(*before, *([nn.MaxPool2d(pool)] if pool > 1 else []), nn.ReLU())
    return module.to_dense() if isinstance(module, (SparseLinear, SparseConv2d)) else module


def _products(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """The dense products of a call, and those whose two factors both exist and are not zero."""
    if isinstance(module, (KWinners, KWinners2d)):
        conv = getattr(module, "conv", None)
        return _products(conv, x) if isinstance(conv, (nn.Conv2d, SparseConv2d)) else (0, 0)
    active = (x != 0).double()
    if isinstance(module, (nn.Linear, SparseLinear)):
        weight = module.weight if isinstance(module, nn.Linear) else module.densify(module.weight)
        rows = active.reshape(-1, active.shape[-1])
        return rows.shape[0] * weight.numel(), round(float(rows.sum(0) @ (weight != 0).double().sum(0)))
    conv = module.to_dense() if isinstance(module, SparseConv2d) else module
    existing = nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, bias=False, padding_mode=conv.padding_mode, device=x.device, dtype=torch.float64,
    )  # fmt: skip
    existing.weight.copy_(conv.weight != 0)
    counted = existing(active)  # each output counts its products
    return counted.numel() * conv.weight[0].numel(), round(float(counted.sum()))


def _median_ms(module: nn.Module, x: Tensor, repeats: int) -> float:
    def synchronize():
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    module(x)
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        module(x)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
