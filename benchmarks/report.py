"""What a comparison found, as a table, as CSV and as a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern.ops import _library
from sparsekern.paper.results import commit, processor, today
from timing import Timing

OURS, DENSE = "sparsekern", "dense"
FLOOR = 0.95  # of dense, under which a layer counts as slower
OTHERS = {  # further rivals, which have a column of their own, and the dtypes in which they are timed
    "plain": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "bf16": (torch.float32,),
    "CSR": (torch.float32, torch.float64),
}
ENVIRONMENT = ("device", "dtype", "threads", "hardware", "torch", "sparsekern", "kernels", "compiler", "commit", "date")
COLUMNS = (
    "case", "work", "batch", "savings", "max_error", "role", "implementation", "ms", "ms_low", "ms_high", "samples",
    *ENVIRONMENT,
)  # fmt: skip
LEGEND = (
    "G: group_size, d: density, k: winners, B: samples in the batch; ±: half the distance of the quartiles. Savings: dense "
    "products over those whose two factors both exist and are not zero; realised: speed-up over savings. Over plain, over "
    "bf16: speed-up over the same network in plain PyTorch, over dense in bfloat16."
)
HEADER = ("layer or network", "B", "dense ms", "sparse ms", "speed-up", "savings", "realised", "max error")
WIDTHS = (23, 4, 10, 11, 8, 7, 8, 9)


@dataclass
class Result:
    """One case: the times of all implementations by role and name, of which the best of each role counts.

    Roles: ``sparsekern``; ``dense``, what it is compared with; and further rivals (OTHERS).
    """

    case: str
    work: str
    batch: int
    savings: float | None
    max_error: float
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)

    def best(self, role: str) -> Timing:
        return min((t for (r, _), t in self.timings.items() if r == role), key=lambda t: t.median)

    def roles(self) -> list[str]:
        return list(dict.fromkeys(role for role, _ in self.timings))

    def speedup(self, role: str = DENSE) -> float:
        return self.best(role).median / self.best(OURS).median

    def realised(self) -> float | None:
        """The measured speed-up as a fraction of the savings."""
        return None if self.savings is None else self.speedup() / self.savings


def table_lines(results: Iterable[Result], others: Iterable[str] = OTHERS) -> Iterator[str]:
    """The table line by line, as the results come: a heading for each layer or network, a row for each of its cases."""
    others = tuple(others)
    titles = [*HEADER, *(f"over {role}" for role in others)]
    widths = [*WIDTHS, *(10 for _ in others)]
    yield _aligned(titles, widths)
    last = None
    for result in results:
        if result.case != last:
            last = result.case
            yield f"\n{result.case}"
        yield _aligned([f"  {result.work}", *cells(result)[2:], *(over(result, role) for role in others)], widths)


def cells(result: Result) -> list[str]:
    """Case, work and the rest of HEADER."""
    savings, realised = result.savings, result.realised()
    return [
        result.case, result.work, str(result.batch), _ms(result.best(DENSE)), _ms(result.best(OURS)),
        f"{result.speedup():.2f}x", "" if savings is None else f"{savings:.1f}x",
        "" if realised is None else f"{realised:.2f}", f"{result.max_error:.0e}",
    ]  # fmt: skip


def over(result: Result, role: str) -> str:
    return f"{result.speedup(role):.2f}x" if role in result.roles() else ""


def _ms(timing: Timing) -> str:
    """The median and half the distance of the quartiles: 1.23 ±4%."""
    spread = (timing.high - timing.low) / 2 / timing.median
    return f"{timing.median:.3g} ±{100 * spread:.0f}%"


def _aligned(texts: list[str], widths: list[int]) -> str:
    first, *rest = (
        f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(texts, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def dense_forms(compiled: bool) -> str:
    """Which of the dense layer's forms count, of which the fastest is the rival."""
    if compiled:
        return "the fastest of as written, channels-last and compiled"
    return "the faster of as written and channels-last (not compiled)"


def caption(where: dict[str, str]) -> str:
    """Where and on what was measured; the commit's "+" in the files stands for changes that were not yet committed."""
    commit = where["commit"] or "unknown"
    if commit.endswith("+"):
        commit = f"{commit[:-1]} with changes"
    threads = f"{where['threads']} thread{'s' if where['threads'] != '1' else ''}"
    return (
        f"{where['hardware']}, {threads}, {where['dtype']}, torch {where['torch']}, kernels: {where['kernels']}, "
        f"{where['date']}, commit {commit}"
    )


def environment(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What each row of the CSV says about where it was measured."""
    C = _library._C
    cpu = torch.device(device).type == "cpu"
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "hardware": f"{processor()}, {os.cpu_count()} CPUs" if cpu else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "sparsekern": sk.__version__,
        "kernels": "reference bodies" if C is None or not cpu else C.instruction_set(),
        "compiler": "" if C is None else C.compiler,
        "commit": commit(Path(__file__).parent),
        "date": today(),
    }


def write_csv(path: Path, results: list[Result], where: dict[str, str]) -> None:
    """A row for each implementation of each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for result in results:
            case = {
                "case": result.case,
                "work": result.work,
                "batch": result.batch,
                "savings": "" if result.savings is None else f"{result.savings:.3f}",
                "max_error": f"{result.max_error:.3g}",
            }
            for (role, name), t in result.timings.items():
                times = {"ms": t.median, "ms_low": t.low, "ms_high": t.high}
                times = {key: f"{value:.5g}" for key, value in times.items()}
                writer.writerow({**case, "role": role, "implementation": name, **times, "samples": t.samples, **where})


def read_csv(path: Path) -> tuple[list[Result], dict[str, str]]:
    """The results of a file that :func:`write_csv` wrote, and their environment."""
    results: dict[tuple, Result] = {}
    where: dict[str, str] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = (row["case"], row["work"], int(row["batch"]))
            savings = float(row["savings"]) if row["savings"] else None
            result = results.setdefault(key, Result(*key, savings, float(row["max_error"])))
            timing = Timing(float(row["ms"]), float(row["ms_low"]), float(row["ms_high"]), int(row["samples"]))
            result.timings[row["role"], row["implementation"]] = timing
            where = {name: row[name] for name in ENVIRONMENT}
    return list(results.values()), where
