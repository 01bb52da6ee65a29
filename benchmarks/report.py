"""What a comparison found, as a table, as CSV and as a picture."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern.ops import _library
from timing import Timing

OURS, OTHER = "sparsekern", "other"
HEADER = (
    "layer or network", "work", "B", "against", "dense ms", "sparse ms", "speed-up", "savings", "realised", "max error",
    "speed-up over others",
)  # fmt: skip
COLUMNS = (
    "case", "work", "batch", "savings", "max_error", "role", "implementation", "ms", "ms_low", "ms_high", "samples",
    "device", "dtype", "threads", "hardware", "torch", "sparsekern", "kernels", "compiler", "commit", "date",
)  # fmt: skip


@dataclass
class Result:
    """One case: the times of all implementations, by role and name.

    Roles: ``sparsekern``, whose best counts; each rival that the case is compared with (``dense``, and for networks
    ``plain``), of whose implementations the best counts; ``other`` for the rest, such as another dtype.
    """

    case: str
    work: str
    batch: int
    savings: float | None
    max_error: float
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)

    def best(self, role: str) -> tuple[str, Timing]:
        """The fastest implementation of a role."""
        candidates = {name: timing for (r, name), timing in self.timings.items() if r == role}
        return min(candidates.items(), key=lambda item: item[1].median)

    def roles(self) -> list[str]:
        return list(dict.fromkeys(role for role, _ in self.timings if role not in (OURS, OTHER)))

    def speedup(self, role: str) -> float:
        return self.best(role)[1].median / self.best(OURS)[1].median


def table_rows(results: list[Result]) -> list[tuple[str, ...]]:
    """The cells of HEADER, a row for each role that a case is compared with."""
    rows = []
    for result in results:
        ours = result.best(OURS)[1]
        others = ", ".join(
            f"{name} {timing.median / ours.median:.1f}x" for (r, name), timing in result.timings.items() if r == OTHER
        )
        for role in result.roles():
            name, rival = result.best(role)
            speedup = result.speedup(role)
            saved = result.savings is not None
            rows.append(
                (
                    result.case, result.work, str(result.batch), name if name.startswith(role) else f"{role}, {name}",
                    _ms(rival), _ms(ours), f"{speedup:.2f}x", f"{result.savings:.1f}x" if saved else "-",
                    f"{speedup / result.savings:.2f}" if saved else "-", f"{result.max_error:.0e}", others,
                )
            )  # fmt: skip
    return rows


def _ms(timing: Timing) -> str:
    """The median and half the distance of the quartiles: 1.23 ±4%."""
    spread = (timing.high - timing.low) / 2 / timing.median
    return f"{timing.median:.3g} ±{100 * spread:.0f}%"


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = (0, 1, 3, 10)) -> str:
    """Aligned plain text, which stays a table in a file and in a narrow pipe."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def environment(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What each row of the CSV says about where it was measured."""
    C = _library._C
    cpu = torch.device(device).type == "cpu"
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "hardware": _processor() if cpu else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "sparsekern": sk.__version__,
        "kernels": "plain PyTorch" if C is None or not cpu else C.instruction_set(),
        "compiler": "" if C is None else C.compiler,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


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
            where = {name: row[name] for name in COLUMNS[11:]}
    return list(results.values()), where
