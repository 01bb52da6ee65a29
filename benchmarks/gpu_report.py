"""What the GPU benchmarks print and write."""

from __future__ import annotations

from importlib.metadata import version

import torch

from gpu_timing import GRAPHED, on_gpu
from report import OURS, Result, environment
from sparsekern.ops import _library


def gpu_environment(device: str, dtype: str) -> dict[str, str]:
    """What each row of the CSV says about where it was measured."""
    where = environment(device, torch.float32) | {"dtype": dtype}
    if on_gpu(device) and _library.has_triton():
        where["kernels"] = f"Triton {version('triton')}"
    return where


def lines(result: Result) -> list[str]:
    """A line for each implementation: its time, its spread, and how much faster the best of ours of its kind is."""
    out = []
    for (role, name), t in result.timings.items():
        ours = like(result, OURS, name.endswith(GRAPHED))
        faster = f"  {t.median / ours:6.2f}x" if ours and role != OURS else ""
        spread = 100 * (t.high - t.low) / 2 / t.median
        out.append(f"  {role:<16} {name:<32} {1e3 * t.median:10.1f} us ±{spread:3.0f}%{faster}")
    return [*out, f"  error {result.max_error:.1e}" + (f", savings {result.savings:.1f}x" if result.savings else "")]


def like(result: Result, role: str, graphed: bool) -> float | None:
    """The best of a role's medians as called, or in CUDA graphs, in ms."""
    times = (t.median for (r, name), t in result.timings.items() if r == role and name.endswith(GRAPHED) == graphed)
    return min(times, default=None)
