"""Measures where the dense way begins to win: for each op and pass the speed-up over dense as more and more is active.

python benchmarks/crossovers.py [--dtype bfloat16] [--only PATTERN] [--csv FILE]

What an op does with it: `fastest_way` in csrc/sparse_linear_ways.h, `sparse_forward_pays` and `backward_ways` in
csrc/sparse_conv2d_ways.h compare costs of the ways, whose constants were fitted to such measurements. To set them anew:

1. Let the function return one way always, and rebuild: `python setup.py build_ext --inplace`.
   (As it is, the speed-ups behind the crossovers stay at about 1, since both sides are dense there.)
2. Run this on an idle machine, for each instruction set that matters (ATEN_CPU_CAPABILITY=avx2 lowers it).
3. Do the same for the other ways, fit the constants, rebuild, and let benchmarks/never_slower.py judge.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsekern as sk
from arguments import ONLY, nothing_to_run
from progress import progress
from report import ENVIRONMENT, caption, environment
from timing import interleaved

ACTIVE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SECONDS = 0.15  # of each point
BATCHES = (1, 64)
COLUMNS = ("layer", "pass", "varied", "batch", "crossover", *(f"active {a:g}" for a in ACTIVE))
WIDTHS = (42, 11, 6, 5, 9, *(max(6, len(f"{a:g}")) for a in ACTIVE))
# The pass, and what of it is more and more active while the other tensor is dense.
PASSES = (
    ("forward", "x"),
    ("grad_input", "x"),
    ("grad_input", "grad_y"),
    ("grad_weight", "x"),
    ("grad_weight", "grad_y"),
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a layer by its arguments, a pass, and what varies."""

    kind: type
    arguments: tuple
    options: tuple
    shape: tuple[int, ...]  # of one sample
    what: str
    varied: str
    batch: int

    def __str__(self) -> str:
        return f"{self.name()} {self.what} by {self.varied}, B={self.batch}"

    def name(self) -> str:
        kind = "linear" if self.kind is sk.SparseLinear else "conv"
        return " ".join(
            [kind, "x".join(map(str, self.arguments)), *(f"{name}={value}" for name, value in self.options)]
        )


def lines() -> Iterator[Line]:
    layers = [
        (sk.SparseLinear, (1600, 1000), (("density", density), ("group_size", group_size)), (1600,))
        for density, group_size in itertools.product((0.1, 0.4, 1), (1, 16))
    ]
    for arguments, side in (((64, 64, 5), 14), ((32, 64, 5), 12), ((128, 128, 3), 14), ((256, 64, 1), 14)):
        layers.append((sk.SparseConv2d, arguments, (), (arguments[0], side, side)))
    for (kind, arguments, options, shape), (what, varied), batch in itertools.product(layers, PASSES, BATCHES):
        yield Line(kind, arguments, options, shape, what, varied, batch)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"), help="(default: float32)"
    )
    parser.add_argument("--only", **ONLY)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every figure here")
    arguments = parser.parse_args(argv)
    chosen = [line for line in lines() if arguments.only.search(str(line))]
    if nothing_to_run("crossovers", arguments.only, chosen):
        return 2
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    where = environment("cpu", dtype)
    print(caption(where))
    rows = [COLUMNS]
    print(_aligned(COLUMNS))
    with progress(chosen) as shown:
        for line in shown:
            speedups = [speedup(line, active, dtype) for active in ACTIVE]
            figures = [f"{s:.2f}" for s in speedups]
            rows.append((line.name(), line.what, line.varied, str(line.batch), crossover(speedups), *figures))
            print(_aligned(rows[-1]), flush=True)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, *ENVIRONMENT))
            writer.writerows((*row, *(where[name] for name in ENVIRONMENT)) for row in rows[1:])
    return 0


def speedup(line: Line, active: float, dtype: torch.dtype) -> float:
    """Dense time over sparse time of one pass with so much of a tensor active."""
    torch.manual_seed(0)
    at_nonzeros = {"sparse_input_grad": line.what == "grad_input" and line.varied == "x"}
    layer = line.kind(*line.arguments, **dict(line.options), **at_nonzeros, dtype=dtype)
    x = sparse((line.batch, *line.shape), active if line.varied == "x" else 1, dtype)
    functions = {}
    for name, module in (("sparse", layer), ("dense", layer.to_dense())):
        grad_y = sparse(module(x).shape, active if line.varied == "grad_y" else 1, dtype)
        functions[name] = one_pass(module, line.what, x, grad_y)
    with torch.inference_mode(line.what == "forward"):
        timings = interleaved(functions, SECONDS, "cpu")
    return timings["dense"].median / timings["sparse"].median


def sparse(shape, active: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * (torch.rand(shape) < active)).to(dtype)


def one_pass(module: nn.Module, what: str, x: Tensor, grad_y: Tensor):
    """A function that runs the forward pass, or the backward pass of one gradient on a graph that is kept."""
    if what == "forward":
        return partial(module.eval(), x)
    leaf = x.clone().requires_grad_() if what == "grad_input" else module.weight
    for parameter in module.parameters():
        parameter.requires_grad_(parameter is leaf)
    y = module(leaf if what == "grad_input" else x)
    return partial(torch.autograd.grad, y, leaf, grad_y, retain_graph=True)


def crossover(speedups: list[float]) -> str:
    """The active fraction at which the speed-up falls below 1, between two measured ones."""
    for i, (s, active) in enumerate(zip(speedups, ACTIVE, strict=True)):
        if s < 1:
            if i == 0:
                return "none"
            share = (speedups[i - 1] - 1) / (speedups[i - 1] - s)
            return f"{ACTIVE[i - 1] + share * (active - ACTIVE[i - 1]):.2f}"
    return "1.00"


def _aligned(row: tuple[str, ...]) -> str:
    titles = (text.removeprefix("active ") for text in row)
    return "  ".join(f"{t:<{w}}" if i < 3 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(titles, WIDTHS, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
