"""Compares the layers with the dense ones that they replace over a wide grid: none may be slower.

python benchmarks/never_slower.py [--cases N] [--csv FILE]

The cases are drawn from the product of everything in LINEAR and CONV, half of each, always the same ones in the same order.
An odd number of cases is rounded down.
A case that is measured under 0.95x is measured again, twice as long each time, and counts as slower only if it stays under
0.95x three times in a row: on a shared machine a single short measurement errs by more than 5 % now and then. Its last
measurement, the longest, is what is written down.
With --csv each result is written as it comes, and a run that was stopped goes on where it was, if on the same commit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsekern as sk
from arguments import at_least
from cases import in_turn
from checking import Call, DenseReference, WrongResult
from progress import progress
from report import ENVIRONMENT, FLOOR, caption, environment
from timing import interleaved

SECONDS = (0.4, 0.8, 1.6)  # of each measurement of a case, the later ones only while it is under the floor
FORWARD = "forward"
TRAINING = "training"  # dense gradient, gradient of the input everywhere
BEHIND_K_WINNERS = "training behind k-winners"  # 10 % of the gradient, the input's gradient at its non-zeros

LINEAR = {
    "shape": [(64, 64), (128, 1024), (784, 128), (1024, 256), (1600, 1000), (1600, 1500), (512, 2048), (4096, 1024)],
    "density": [0.05, 0.1, 0.2, 0.4, 1.0],
    "group_size": [1, 4, 16],
    "active": [0.02, 0.1, 0.3, 0.6, 1.0],
    "batch": [1, 4, 16, 64, 256],
    "dtype": ["float32", "bfloat16"],
    "work": [FORWARD, TRAINING, BEHIND_K_WINNERS],
}
CONV = {  # in and out channels, kernel, side of the image, stride, padding
    "shape": [
        (32, 64, 5, 12, 1, 0), (64, 64, 5, 14, 1, 0), (16, 32, 3, 28, 1, 1), (128, 128, 3, 14, 1, 1),
        (64, 128, 3, 28, 2, 1), (256, 64, 1, 14, 1, 0), (1, 32, 5, 28, 1, 0), (3, 64, 7, 32, 2, 3),
    ],
    "channels_last": [False, True],
    "active": [0.02, 0.1, 0.3, 0.6, 1.0],
    "batch": [1, 4, 16, 64],
    "dtype": ["float32", "bfloat16"],
    "work": [FORWARD, TRAINING, BEHIND_K_WINNERS],
}  # fmt: skip
COLUMNS = (
    "layer", "shape", "density", "group_size", "channels_last", "active", "batch", "dtype", "work",
    "dense_ms", "sparse_ms", "speedup", "measurements",
)  # fmt: skip
NAMES = COLUMNS[:9]  # what says which case it is


@dataclass
class Case:
    """One combination of the grid; a dimension that its layer does not have is empty."""

    values: dict[str, str]
    layer: nn.Module
    dense: nn.Module
    xs: list[Tensor]
    grads: list[Tensor | None]

    def functions(self) -> dict:
        members = list(zip(self.xs, self.grads, strict=True))
        work = _forward if self.grads[0] is None else _step
        return {
            name: in_turn(partial(work, module, list(module.parameters())), members)
            for name, module in (("sparse", self.layer), ("dense", self.dense))
        }


def main(argv: list[str] | None = None) -> int:
    """Runs the grid; 1 where a case is slower or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        type=at_least(2),
        default=600,
        metavar="N",
        help="how many, at least 2; an odd number is rounded down (default: 600)",
    )
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write each result here, or go on where it ends")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    where = environment("cpu", torch.float32)
    rows, file = resumed(arguments.csv, where)
    done = {tuple(row[name] for name in NAMES) for row in rows}
    todo = [values for values in grid(arguments.cases) if tuple(values[name] for name in NAMES) not in done]
    wrong = 0
    with progress(todo) as shown, file:
        writer = csv.DictWriter(
            file, (*COLUMNS, *(name for name in ENVIRONMENT if name not in COLUMNS)), lineterminator="\n"
        )
        if not rows:
            writer.writeheader()
        for values in shown:
            try:
                row = measure(build(values))
            except WrongResult as error:
                print(f"WRONG RESULT, not timed: {title(values)}: {error}", flush=True)
                wrong += 1
                continue
            if float(row["speedup"]) < FLOOR:
                print(f"{row['speedup']}x  {title(row)}", flush=True)
            rows.append({**where, **row})
            writer.writerow(rows[-1])
            file.flush()
    print(summary(rows, where))
    return 1 if wrong or any(float(row["speedup"]) < FLOOR for row in rows) else 0


def resumed(path: Path | None, where: dict[str, str]) -> tuple[list[dict], contextlib.AbstractContextManager]:
    """The rows that a file has already, and the file, open at its end. Those of another commit or machine are dropped."""
    if path is None:
        return [], open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if any(_origin(row) != _origin(where) for row in rows):
            rows = []
    return rows, open(path, "a" if rows else "w", newline="")


def _origin(row: dict[str, str]) -> list[str]:
    """What figures have in common that may stand in one table."""
    return [str(row[name]) for name in ENVIRONMENT if name not in ("dtype", "date")]


def grid(cases: int) -> list[dict[str, str]]:
    """The combinations that are measured, in an order in which each part of the run is a fair sample of the whole."""
    drawn = []
    for layer, dimensions in (("linear", LINEAR), ("conv", CONV)):
        product = [dict(zip(dimensions, values, strict=True)) for values in itertools.product(*dimensions.values())]
        # At density 1 groups mean nothing to the user, yet the layouts differ: all are kept.
        drawn.append([{"layer": layer, **values} for values in random.Random(0).sample(product, cases // 2)])
    mixed = itertools.chain.from_iterable(zip(*drawn, strict=True))
    return [{name: _text(values.get(name, "")) for name in NAMES} for values in mixed]


def _text(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def title(values: dict[str, str]) -> str:
    names = {"density": "d=", "group_size": "G=", "active": "active=", "batch": "B="}
    layout = {"True": "channels-last", "False": "contiguous", "": ""}[values["channels_last"]]
    parts = [names.get(name, "") + values[name] for name in NAMES if name != "channels_last" and values[name]]
    return " ".join([*parts, layout]).rstrip()


def build(values: dict[str, str]) -> Case:
    """The layers of a case and its inputs, about a fraction ``active`` of which k-winners let through."""
    torch.manual_seed(0)
    dtype, batch, work = getattr(torch, values["dtype"]), int(values["batch"]), values["work"]
    sizes = [int(size) for size in values["shape"].split("x")]
    options = {"dtype": dtype, "sparse_input_grad": work == BEHIND_K_WINNERS}
    if values["layer"] == "linear":
        layer = sk.SparseLinear(
            *sizes, density=float(values["density"]), group_size=int(values["group_size"]), **options
        )
        shape, memory_format = (batch, sizes[0]), torch.contiguous_format
    else:
        channels, filters, kernel, side, stride, padding = sizes
        layer = sk.SparseConv2d(channels, filters, kernel, stride, padding, **options)
        shape = (batch, channels, side, side)
        memory_format = torch.channels_last if values["channels_last"] == "True" else torch.contiguous_format
        layer = layer.to(memory_format=memory_format)
    dense = layer.to_dense()
    xs = [_winners(shape, float(values["active"]), dtype).contiguous(memory_format=memory_format) for _ in range(4)]
    grads: list[Tensor | None] = [None] * len(xs)
    if work == FORWARD:
        layer.eval()
    else:
        xs = [x.requires_grad_() for x in xs]
        density = 0.1 if work == BEHIND_K_WINNERS else 1.0
        y = dense(xs[0])
        grads = [_winners(y.shape, density, dtype).contiguous(memory_format=memory_format) for _ in xs]
    return Case(values, layer, dense, xs, grads)


def _winners(shape, density: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).flatten(1)
    return sk.functional.k_winners(x, max(1, round(density * x.shape[1]))).view(shape).to(dtype)


def _forward(module, parameters, member):
    return module(member[0])


def _step(module, parameters, member):
    x, grad_y = member
    y = module(x)
    return y, torch.autograd.grad(y, (x, *parameters), grad_y)


def measure(case: Case) -> dict[str, str]:
    """Checks a case, then times it, and again for longer while it is under the floor."""
    check(case)
    functions, speedup, measurements = case.functions(), 0.0, 0
    while speedup < FLOOR and measurements < len(SECONDS):
        with torch.inference_mode(case.grads[0] is None):
            timings = interleaved(functions, SECONDS[measurements], "cpu")
        speedup = timings["dense"].median / timings["sparse"].median
        measurements += 1
    ms = {f"{name}_ms": f"{timing.median:.5g}" for name, timing in timings.items()}
    return {**case.values, **ms, "speedup": f"{speedup:.3f}", "measurements": str(measurements)}


def check(case: Case) -> None:
    """The layer's result and gradients on one of the inputs, against float64."""
    x, grad_y = case.xs[0], case.grads[0]
    y, gradients = case.layer(x), ()
    if grad_y is not None:
        gradients = torch.autograd.grad(y, (x, *case.layer.parameters()), grad_y)
    DenseReference(case.layer).check(Call(x, y.detach(), grad_y, *gradients))


def summary(rows: list[dict], where: dict[str, str]) -> str:
    if not rows:
        return "no case"
    speedups = sorted(float(row["speedup"]) for row in rows)
    slower = sum(speedup < FLOOR for speedup in speedups)
    return (
        f"{caption({**where, 'dtype': 'float32 and bfloat16'})}\n{len(rows)} cases: {slower} under {FLOOR}x, lowest "
        f"{speedups[0]:.2f}x, median {speedups[len(rows) // 2]:.2f}x, highest {speedups[-1]:.0f}x"
    )


if __name__ == "__main__":
    sys.exit(main())
