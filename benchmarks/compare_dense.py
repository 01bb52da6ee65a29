"""Compares sparsekern's layers and the paper's networks with dense PyTorch: checked first, then timed side by side.

python benchmarks/compare_dense.py [--full] [--only PATTERN] [--csv FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from arguments import ONLY, at_least, device, no_gpu, nothing_to_run
from cases import Case, Options
from checking import WrongResult
from layer_cases import layer_cases
from network_cases import network_cases
from progress import progress
from report import LEGEND, OTHERS, Result, caption, dense_forms, environment, table_lines, write_csv
from timing import interleaved

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SECONDS = {"quick": 1.0, "full": 6.0}  # of timing, for each case


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; 0, or 1 after a wrong result, or 2 where nothing could be run."""
    arguments = parse(argv)
    if no_gpu("compare_dense", arguments.device):
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cases = [case for case in all_cases() if arguments.only.search(str(case))]
    if nothing_to_run("compare_dense", arguments.only, cases):
        return 2
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: TF32 would be outside the bounds
    options = Options(arguments.device, DTYPES[arguments.dtype], compiled=arguments.full)
    where = environment(options.device, options.dtype)
    print(caption(where))
    print(f"Checked against float64 first, then timed side by side. Dense is {dense_forms(options.compiled)}.")
    print(f"{LEGEND}\n")
    results, wrong = [], []
    others = [role for role in OTHERS if options.dtype in OTHERS[role]]
    with progress(cases) as shown:
        for line in table_lines(run(shown, options, arguments.full, results, wrong), others):
            print(line, flush=True)
    for message in wrong:
        print(f"WRONG RESULT, not timed: {message}", file=sys.stderr)
    if arguments.csv:
        write_csv(arguments.csv, results, where)
    if arguments.plot and results:
        from plot import plot

        plot(arguments.plot, results, where)
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="under three minutes, nothing compiled (the default)")
    extent.add_argument("--full", action="store_true", help="more repeats, and torch.compile among the rivals")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default: float32)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--only", **ONLY)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every timing here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups here (PNG or SVG)")
    return parser.parse_args(argv)


def all_cases() -> list[Case]:
    return [*network_cases(), *layer_cases()]


def run(
    cases: Iterable[Case], options: Options, full: bool, results: list[Result], wrong: list[str]
) -> Iterator[Result]:
    """Checks and then times each case, and keeps and yields its result; of a wrong one it keeps what was wrong."""
    for case in cases:
        try:
            results.append(run_case(case, options, SECONDS["full" if full else "quick"]))
        except WrongResult as error:
            wrong.append(f"{case}: {error}")
        else:
            yield results[-1]


def run_case(case: Case, options: Options, seconds: float) -> Result:
    prepared = case.prepare(options)
    checked = prepared.check()
    with contextlib.nullcontext() if prepared.training else torch.inference_mode():
        timings = interleaved(prepared.functions, seconds, options.device)
    torch.compiler.reset()
    savings = checked.dense_products / checked.products if checked.products else None
    return Result(case.name, case.work, case.batch, savings, checked.error, timings)


if __name__ == "__main__":
    sys.exit(main())
