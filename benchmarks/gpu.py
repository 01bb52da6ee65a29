"""Every GPU figure in one command: checked first, then timed side by side with every rival, as called and in CUDA graphs.

python benchmarks/gpu.py [--device cpu] [--only PATTERN] [--seconds S] [--csv FILE]   (cpu: tiny, to see that all runs)
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import autoencoder
from arguments import ONLY, no_gpu, nothing_to_run
from cases import Options
from checking import WrongResult
from gpu_cases import CASES, Row, with_tf32
from gpu_report import gpu_environment, lines
from gpu_timing import on_gpu, timings
from network_cases import STEP, network_cases
from report import DENSE, OURS, Result, caption, write_csv
from timing import Timing

REHEARSAL = 1 / 256  # of each size, on CPU
AUTOENCODER = "TopK autoencoder"
# Networks that are compiled too: each form of each rival takes the compiler 10 to 20 s.
COMPILED = tuple(f"{name} sparseCNN2 G=1, {STEP}, B=64" for name in ("mnist", "speech"))


def main(argv: list[str] | None = None) -> int:
    """0, or 1 after a wrong result or a row that could not be run, or 2 where nothing could be run."""
    arguments = parse(argv)
    device = arguments.device
    if no_gpu("gpu", device):
        return 2
    rows = {name: work for name, work in every_row(arguments).items() if arguments.only.search(name)}
    if nothing_to_run("gpu", arguments.only, list(rows)):
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = gpu_environment(device, "as named")
    where["commit"] = arguments.commit or where["commit"]
    print(caption(where), flush=True)
    results, failed = [], []
    began = time.perf_counter()
    for name, work in rows.items():
        if time.perf_counter() - began > arguments.seconds:
            failed.append(f"{name}: no time left")
            continue
        for result in measure(name, work, failed):
            results.append(result)
            if arguments.csv:  # what is measured is kept, whatever comes
                write_csv(arguments.csv, results, where)
        if on_gpu(device):
            torch.cuda.empty_cache()
    print("\n" + "\n".join(["every row was measured"] if not failed else ["NOT MEASURED:", *failed]))
    return 1 if failed else 0


def measure(name: str, work: Callable[[], Iterator[Result]], failed: list[str]) -> Iterator[Result]:
    """The row's results, printed as they come; why there are no more is appended to failed."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        for result in work():
            title = ", ".join(filter(None, (result.case, result.work)))
            print(f"\n{title}  ({time.perf_counter() - start:.0f} s)\n" + "\n".join(lines(result)), flush=True)
            yield result
    except WrongResult as error:
        print(f"\n{name}\n  WRONG RESULT, not timed: {error}", flush=True)
        failed.append(f"{name}: wrong result")
    except Exception as error:  # the other rows are to be had all the same
        print(f"\n{name}\n{traceback.format_exc()}", flush=True)
        failed.append(f"{name}: {type(error).__name__}")
    finally:
        torch.compiler.reset()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses (default: cuda)")
    parser.add_argument("--only", **ONLY)
    parser.add_argument("--seconds", type=float, default=450, help="after which no row is begun (default: 450)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--commit", default="", help="what the CSV file says where git does not know")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every timing here")
    return parser.parse_args(argv)


def every_row(arguments: argparse.Namespace) -> dict[str, Callable[[], Iterator[Result]]]:
    """What measures each row, by name; last those that torch.compile takes the longest for."""
    device, compiled = arguments.device, arguments.compile and on_gpu(arguments.device)
    rows = {name: lambda name=name: run(name, device, compiled) for name in CASES}
    rows[AUTOENCODER] = lambda: autoencoder.measured(device, compiled)
    for name in sorted(networks(), key=COMPILED.__contains__):
        rows[name] = lambda name=name: run_network(name, device, compiled)
    return rows


def networks() -> dict:
    """The paper's networks, by row."""
    return {f"{case.name}, {case.work}, B={case.batch}": case for case in network_cases()}


def run(name: str, device: str, compiled: bool) -> Iterator[Result]:
    row = CASES[name](device, 1 if device == "cuda" else REHEARSAL, compiled)
    batch = int(re.search(r"B=(\d+)", name + " B=0").group(1))
    yield result_of(Result(name, "", batch, row.savings, row.error), row, device)


def run_network(name: str, device: str, compiled: bool) -> Iterator[Result]:
    case = networks()[name]
    prepared = case.prepare(Options(device, torch.float32, compiled=compiled and name in COMPILED))
    with plain_convolutions():
        checked = prepared.check()
    savings = checked.dense_products / checked.products
    functions = prepared.functions | (narrower(prepared.functions, device) if on_gpu(device) else {})
    row = Row(functions, checked.error, training=prepared.training)
    yield result_of(Result(case.name, case.work, case.batch, savings, checked.error), row, device)


def narrower(functions: dict, device: str) -> dict:
    """The dense network and ours in TF32, which PyTorch's convolutions take by default, and in bfloat16 by autocast."""
    found = {}
    for kind, wrapper in (("TF32", with_tf32), ("bf16", partial(with_bfloat16, device))):
        for (role, name), function in functions.items():
            if role in (OURS, DENSE) and "compiled" not in name:
                found[kind if role == DENSE else f"{OURS} {kind}", name] = partial(wrapper, function)
    return found


def with_bfloat16(device: str, function: Callable) -> object:
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):  # no cast outlives the graph that it is part of
        return function()


def result_of(result: Result, row: Row, device: str) -> Result:
    with torch.set_grad_enabled(row.training or "backward" in result.case):
        timed = timings(row.functions, device, row.graphs)
    n = row.calls
    result.timings = {key: Timing(t.median / n, t.low / n, t.high / n, t.samples) for key, t in timed.items()}
    return result


@contextlib.contextmanager
def plain_convolutions():
    """Without cuDNN, whose transforms err by more than sums of products do: what is checked are our own kernels."""
    cudnn = torch.backends.cudnn
    before, cudnn.enabled = cudnn.enabled, False
    try:
        yield
    finally:
        cudnn.enabled = before


if __name__ == "__main__":
    sys.exit(main())
