"""Every GPU figure in one command: checked first, then timed side by side with every rival, as called and in CUDA graphs.

python benchmarks/gpu.py [--device cpu] [--only PATTERN] [--csv FILE]   (cpu: tiny sizes, to see that everything runs)
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from cases import Options
from checking import WrongResult
from gpu_cases import CASES, Row
from gpu_timing import GRAPHED, timings
from network_cases import network_cases
from report import OURS, Result, caption, environment, write_csv
from sparsekern.ops import _library

REHEARSAL = 1 / 256  # of each size, on CPU


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a wrong result, or 2 where nothing could be run."""
    arguments = parse(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: no GPU that PyTorch can use; --device cpu rehearses", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = environment(device, torch.float32)
    where["dtype"] = "as named"
    where["kernels"] = f"Triton {version('triton')}" if device == "cuda" and _library.has_triton() else where["kernels"]
    print(caption(where), flush=True)
    names = [name for name in (*CASES, *networks()) if arguments.only is None or arguments.only.search(name)]
    results, wrong = [], 0
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            results.append(run(name, device, arguments.compile))
        except WrongResult as error:
            wrong += 1
            print(f"{name}\n  WRONG RESULT, not timed: {error}", flush=True)
        except torch.OutOfMemoryError as error:
            print(f"{name}\n  out of memory, not timed: {str(error).splitlines()[0]}", flush=True)
        else:
            print(f"\n{name}  ({time.perf_counter() - start:.0f} s)\n" + "\n".join(lines(results[-1])), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    if arguments.csv:
        write_csv(arguments.csv, results, where)
    return 1 if wrong else 0 if names else 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", type=lambda t: re.compile(t, re.I), metavar="PATTERN", help="rows with this in them")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every timing here")
    return parser.parse_args(argv)


def networks() -> dict:
    """The paper's networks, by row."""
    return {f"{case.name}, {case.work}, B={case.batch}": case for case in network_cases()}


def run(name: str, device: str, compiled: bool) -> Result:
    compiled = compiled and device == "cuda"
    if name in CASES:
        row = CASES[name](device, 1 if device == "cuda" else REHEARSAL, compiled)
    else:
        prepared = networks()[name].prepare(Options(device, torch.float32, compiled=False))
        checked = prepared.check()
        savings = checked.dense_products / checked.products
        row = Row(prepared.functions, checked.error, savings, training=prepared.training)
    batch = int(re.search(r"B=(\d+)", name + " B=0").group(1))
    with torch.set_grad_enabled(row.training or "backward" in name):
        measured = timings(row.functions, device, row.graphs)
    torch.compiler.reset()
    return Result(name, "", batch, row.savings, row.error, measured)


def lines(result: Result) -> list[str]:
    """A line for each implementation: its time, its spread, and how much faster the best of ours of its kind is."""
    out = []
    for (role, name), t in result.timings.items():
        kin = [
            ours
            for (r, n), ours in result.timings.items()
            if r == OURS and n.endswith(GRAPHED) == name.endswith(GRAPHED)
        ]
        faster = f"  {t.median / min(o.median for o in kin):6.2f}x" if kin and role != OURS else ""
        spread = 100 * (t.high - t.low) / 2 / t.median
        out.append(f"  {role:<11} {name:<32} {1e3 * t.median:10.1f} us ±{spread:3.0f}%{faster}")
    return [*out, f"  error {result.max_error:.1e}" + (f", savings {result.savings:.1f}x" if result.savings else "")]


if __name__ == "__main__":
    sys.exit(main())
