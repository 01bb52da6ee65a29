"""What bounds each kernel and what share of it is reached, on one core.

python benchmarks/roofline.py [--only PATTERN] [--csv FILE]

The peaks are measured first (peaks.c, by the C compiler): multiply-adds, and reads from each level of memory. Then three
times that a kernel cannot beat, of which the longest is its bound:

- arithmetic: products that are not zero, at the rate of multiply-adds;
- loads: a weight from the first-level cache for each product, since two samples seldom have the same units active, so that
  a weight in a register serves one product;
- traffic: inputs, outputs, gradients, and the weights of the active inputs, once each, from the level that holds them all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

from arguments import ONLY, nothing_to_run
from cases import POOL, Case, Options
from checking import Checked
from layer_cases import layer_cases
from progress import progress
from report import ENVIRONMENT, OURS, caption, environment
from timing import interleaved

SECONDS = 0.5  # of each kernel
TRIES = 30  # of each peak, a few milliseconds each: the best counts
KIB, MIB = 2**10, 2**20
COLUMNS = (
    "layer", "work", "B", "M products", "MB moved", "from", "arithmetic ms", "loads ms", "traffic ms", "measured ms",
    "share of the bound",
)  # fmt: skip
WIDTHS = (44, 18, 4, 10, 8, 6, 13, 8, 10, 11, 18)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", **ONLY)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every figure here")
    arguments = parser.parse_args(argv)
    cases = [case for case in layer_cases() if arguments.only.search(str(case))]
    if nothing_to_run("roofline", arguments.only, cases):
        return 2
    torch.set_num_threads(1)
    peaks = measured_peaks()
    where = {**environment("cpu", torch.float32), "peaks": describe(peaks)}
    print(caption(where))
    print(where["peaks"])
    print(_aligned(COLUMNS))
    rows = []
    with progress(cases) as shown:
        for case in shown:
            rows.append(row(case, peaks))
            print(_aligned(rows[-1]), flush=True)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, "peaks", *ENVIRONMENT))
            writer.writerows((*each, where["peaks"], *(where[name] for name in ENVIRONMENT)) for each in rows)
    return 0


def measured_peaks() -> dict[str, float]:
    """Operations a second, and bytes a second from each level of memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peaks.so"
        source = Path(__file__).with_name("peaks.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC", source, "-o", path], check=True
        )
        library = ctypes.CDLL(str(path))
    library.flops.restype = library.read_rate.restype = ctypes.c_double
    peaks = {"flops": max(library.flops(ctypes.c_long(500_000)) for _ in range(TRIES))}
    for level, size in levels().items():
        peaks[level] = _read_rate(library, size)
    return peaks


def levels() -> dict[str, int]:
    """Bytes of the buffer that stands for each level: half of a cache's size."""
    sizes = {level: _getconf(f"LEVEL{level[1]}_{kind}CACHE_SIZE") for level, kind in (("L1", "D"), ("L2", ""))}
    return {"L1": sizes["L1"] // 2, "L2": sizes["L2"] // 2, "beyond": 16 * max(sizes["L2"], MIB)}


def _getconf(name: str) -> int:
    """What the system says of a cache, and common sizes where it says nothing."""
    with contextlib.suppress(OSError):
        answer = subprocess.run(["getconf", name], capture_output=True, text=True).stdout.strip()
        if answer.isdecimal() and int(answer):
            return int(answer)
    return {"1": 32 * KIB, "2": MIB}[name[5]]


def _read_rate(library, size: int) -> float:
    floats = size // 4 // 128 * 128
    buffer = numpy.zeros(floats + 16, numpy.float32)
    address = ctypes.c_void_p(buffer.ctypes.data + -buffer.ctypes.data % 64)
    rounds = ctypes.c_long(max(1, 2 * 10**8 // size))
    return max(library.read_rate(address, ctypes.c_size_t(floats), rounds) for _ in range(TRIES))


def describe(peaks: dict[str, float]) -> str:
    rates = ", ".join(f"{peaks[level] / 1e9:.0f} from {level}" for level in ("L1", "L2", "beyond"))
    return f"one core: {peaks['flops'] / 1e9:.0f} GFLOP/s; reads in GB/s: {rates}"


def row(case: Case, peaks: dict[str, float]) -> tuple[str, ...]:
    """A line of the table: the case's bounds in ms, its measured time, and the share."""
    prepared = case.prepare(Options())
    checked = prepared.check()
    function = next(f for (role, _), f in prepared.functions.items() if role == OURS)
    with torch.inference_mode(not prepared.training):
        measured = interleaved({OURS: function}, SECONDS, "cpu")[OURS].median
    calls = POOL[case.batch] * sum(role == OURS for role, _ in prepared.functions)
    level, bounds = lower_bounds(checked, calls, peaks)
    return (
        case.name, case.work, str(case.batch), f"{checked.products / calls / 1e6:.3g}",
        f"{checked.moved / calls / 1e6:.3g}", level, *(f"{ms:.3g}" for ms in bounds), f"{measured:.3g}",
        f"{max(bounds) / measured:.2f}",
    )  # fmt: skip


def lower_bounds(checked: Checked, calls: int, peaks: dict[str, float]) -> tuple[str, tuple[float, float, float]]:
    """The level that holds everything, and the ms of arithmetic, loads and traffic of one call."""
    products, moved, held = (1e3 * value / calls for value in (checked.products, checked.moved, checked.held))
    sizes = levels()
    level = next((name for name in ("L1", "L2") if held / 1e3 <= 2 * sizes[name]), "beyond")
    return level, (2 * products / peaks["flops"], 4 * products / peaks["L1"], moved / peaks[level])


def _aligned(texts: tuple[str, ...]) -> str:
    return "  ".join(f"{t:<{w}}" if i < 2 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(texts, WIDTHS, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
