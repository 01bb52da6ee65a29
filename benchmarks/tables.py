"""Writes the tables of README.md and docs/performance.md, between their markers, and README's plot, from results/*.csv.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpu_tables import gpu_table
from plot import plot
from report import DENSE, ENVIRONMENT, FLOOR, LEGEND, OTHERS, Result, caption, cells, dense_forms, over, read_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOT = "docs/speed.png"

# The speed-ups to reach, over dense and over the same network in plain PyTorch: (case, work, batch) -> role -> speed-up.
TARGETS: dict[tuple[str, str, int], dict[str, float]] = {
    ("mnist sparseCNN2 G=1", "training step", 64): {DENSE: 3, "plain": 5},
    ("speech sparseCNN2 G=1", "training step", 64): {DENSE: 2.5, "plain": 4},
    ("k-winners n=1000 k=100, against torch ops", "training forward", 64): {DENSE: 10},
    ("k-winners n=12544 k=1200, against torch ops", "training forward", 64): {DENSE: 10},
    ("linear 32768->4096 d=1 k=32 G=16", "decode", 1): {DENSE: 300},
}
for case in ("speech sparseCNN2 G=1", "speech superSparseCNN2 G=1"):
    TARGETS[case, "inference", 1], TARGETS[case, "inference", 64] = {DENSE: 4}, {DENSE: 3}
for case, first, many, most, both in (
    ("linear 1600->1000 d=0.4 k=200 G=1", 15, 3.5, 3.5, 3.5),
    ("linear 1600->1500 d=0.1 k=200 G=1", 20, 6, 5, 6),
    ("linear 1600->1000 d=0.4 k=200 G=16", 20, 5, 5, 6),
    ("linear 1600->1500 d=0.1 k=200 G=16", 40, 20, 15, 20),
    ("conv 64->64 5x5 on 14x14, k=1200 of 12544", 5, 5, None, 4),
    ("conv 32->64 5x5 on 12x12, k=400 of 4608", 6, 5, None, 4),
):
    for batch, reach in ((1, first), (64, many), (1024, most)):
        if reach:
            TARGETS[case, "forward", batch] = {DENSE: reach}
    TARGETS[case, "forward + backward", 64] = {DENSE: both}
for case, work in (
    ("linear 1600->1000 d=0.4, dense input", "forward"),
    ("linear 1600->1500 d=0.1 G=16, dense input", "forward"),
    ("linear 1600->1500 d=0.1 G=16, dense input", "forward + backward"),
    ("conv 64->64 5x5 on 14x14, dense input", "forward"),
):
    TARGETS[case, work, 64] = {DENSE: 0.95}


def main(argv: list[str] | None = None) -> int:
    """Writes tables and plot and names the targets that are missed; with --check, 1 where one is out of step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where a table or the plot is out of step"
    )
    check = parser.parse_args(argv).check
    stale = []
    for document, tables in {"README.md": readme_tables(), "docs/performance.md": performance_tables()}.items():
        path = ROOT / document
        old = path.read_text()
        new = filled(old, tables)
        if new != old:
            stale.append(document)
            if not check:
                path.write_text(new)
    for results, where in readme_comparison():
        if caption(where).encode() not in _bytes(ROOT / PLOT):
            stale.append(PLOT)
        if not check:
            plot(ROOT / PLOT, results, where)
    if not check:
        print("\n".join(missed()) or "every target is reached")
    if stale:
        print(f"{'out of step with benchmarks/results' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


def _bytes(path: Path) -> bytes:
    """The file's, if there is one: a plot's hold the caption that it was drawn with."""
    return path.read_bytes() if path.exists() else b""


def filled(text: str, tables: dict[str, str]) -> str:
    """The document with each table between its markers; one without results leaves nothing there."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"tables: wants the markers {begin} and {end} once each")
        body = f"{begin}\n{table}\n{end}" if table else f"{begin}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def comparisons(folder: str = ".") -> list[tuple[list[Result], dict[str, str]]]:
    """The results of compare_dense, by dtype and number of threads; in a folder those of another processor."""
    read = [read_csv(path) for path in sorted((RESULTS / folder).glob("compare_dense*.csv"))]
    return sorted(read, key=lambda file: (file[1]["dtype"] != "float32", int(file[1]["threads"])))


def readme_comparison() -> list[tuple[list[Result], dict[str, str]]]:
    """What README shows, if it is there: float32, on the most threads."""
    return [file for file in comparisons() if file[1]["dtype"] == "float32"][-1:]


def readme_tables() -> dict[str, str]:
    """A row for each network and layer at B=64 (else at its only B), and every row that loses."""
    gpu = RESULTS / "gpu.csv"
    tables = {"GPU table": gpu_table(*read_csv(gpu)) if gpu.exists() else ""}
    if not readme_comparison():
        return {"speed table": "", **tables}
    [(results, where)] = readme_comparison()
    at_64 = {result.case for result in results if result.batch == 64}
    shown = [r for r in results if r.batch == 64 or r.case not in at_64 or r.speedup() < 1]
    header = [
        "layer or network",
        "work",
        "B",
        "dense ms",
        "sparse ms",
        "speed-up",
        "savings",
        "realised",
        "over plain",
        "over bf16",
    ]
    rows = [[*cells(r)[:8], over(r, "plain"), over(r, "bf16")] for r in shown]
    notes = (
        f"{LEGEND} Dense is {forms(results)}, for a network that of the same widths with ReLU. Checked against float64 "
        "first, then timed side by side. [All rows, and what bounds them](docs/performance.md)."
    )
    parts = [
        f"![Speed-up over dense PyTorch]({PLOT})", markdown(header, rows), wrapped(caption(where)),
        wrapped(notes), wrapped(slower_in_short()),
    ]  # fmt: skip
    return {"speed table": "\n\n".join(filter(None, parts)), **tables}


def forms(results: list[Result]) -> str:
    """Which forms of the dense layers and networks are among the results."""
    names = [name for result in results for role, name in result.timings if role == DENSE]
    return dense_forms(any("compiled" in name for name in names))


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def performance_tables() -> dict[str, str]:
    return {
        "compare_dense": comparison_tables("."),
        "compare_dense on Zen 4": comparison_tables("zen4"),
        "never_slower": never_slower_table(),
        "roofline": roofline_table(),
    }


def comparison_tables(folder: str) -> str:
    compared = comparisons(folder)
    tables = [f"{wrapped(caption(where))}\n\n{comparison_table(results)}" for results, where in compared]
    if compared:
        tables.append(wrapped(f"Dense is {forms([result for results, _ in compared for result in results])}."))
    return "\n\n".join(tables)


def missed() -> Iterator[str]:
    """A line for each target that is not reached."""
    for results, where in comparisons():
        for result in results:
            for role, target in TARGETS.get((result.case, result.work, result.batch), {}).items():
                if role in result.roles() and result.speedup(role) < target:
                    threads = f"{where['threads']} thread{'s' if where['threads'] != '1' else ''}"
                    yield (
                        f"{threads}, {result.case}, {result.work}, B={result.batch}: "
                        f"{result.speedup(role):.2f}x over {role}, target {target:g}x"
                    )


def comparison_table(results: list[Result]) -> str:
    header = [
        "layer or network",
        "work",
        "B",
        "dense ms",
        "sparse ms",
        "speed-up",
        "savings",
        "realised",
        "max error",
        "target",
    ]
    rows = [
        [*cells(result), _target(result, DENSE), *(over(result, role) for role in OTHERS), _target(result, "plain")]
        for result in results
    ]
    return markdown([*header, *(f"over {role}" for role in OTHERS), "target over plain"], rows)


def _target(result: Result, role: str) -> str:
    """The target, and whether it is reached."""
    target = TARGETS.get((result.case, result.work, result.batch), {}).get(role)
    if target is None or role not in result.roles():
        return ""
    return f"{target:g}x {'reached' if result.speedup(role) >= target else 'missed'}"


def _grid(folder: str = ".") -> list[dict[str, str]]:
    """The rows of never_slower.py, if it ran."""
    path = RESULTS / folder / "never_slower.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# What the slower cases have in common: a case belongs to the first that holds.
SLOW_KINDS = {
    "64 x 64 layers": lambda row: row["shape"] == "64x64",
    "training steps of 1 to 4 samples": lambda row: row["work"] != "forward" and int(row["batch"]) <= 4,
    "bfloat16": lambda row: row["dtype"] == "bfloat16",
    "convolutions whose input is mostly active": lambda row: row["layer"] == "conv" and float(row["active"]) > 0.5,
    "all else": lambda row: True,
}


def _slow_kinds(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """The speed-ups of the cases of each kind."""
    kinds: dict[str, list[float]] = {name: [] for name in SLOW_KINDS}
    for row in rows:
        kinds[next(name for name, holds in SLOW_KINDS.items() if holds(row))].append(float(row["speedup"]))
    return {name: sorted(ratios) for name, ratios in kinds.items() if ratios}


def _slow(ratios: list[float]) -> int:
    return sum(ratio < FLOOR for ratio in ratios)


def _outcome(rows: list[dict[str, str]]) -> str:
    """How many of the grid's cases are slower than dense, and how far."""
    ratios = [float(row["speedup"]) for row in rows]
    threads = "one thread" if rows[0]["threads"] == "1" else f"{rows[0]['threads']} threads"
    return (
        f"Of {len(rows)} combinations of layer, density, group size, active fraction, batch, dtype and kind of work on "
        f"{threads}, {_slow(ratios)} are below {FLOOR:g}x of the dense layer's speed, the lowest at {min(ratios):.2f}x"
    )


def _slower_kinds(rows: list[dict[str, str]]) -> str:
    """The outcome, and how many of the slower cases are of which kind."""
    kinds = {name: _slow(ratios) for name, ratios in _slow_kinds(rows).items()}
    parts = ", ".join(f"{name} ({count})" for name, count in kinds.items() if count)
    return f"{_outcome(rows)}{': ' if parts else ''}{parts}."


def slower_in_short() -> str:
    """README's sentence on what is slower than dense."""
    rows = _grid()
    return f"{_slower_kinds(rows)} [Where it is slower](docs/performance.md#where-it-is-slower)." if rows else ""


def never_slower_table() -> str:
    """The outcome, the cases by what the slower ones have in common, and all cases by kind."""
    rows = _grid()
    if not rows:
        return ""
    header = ["what", "cases", "lowest", "median", "under 0.95x"]
    common = [
        [name, str(len(ratios)), f"{ratios[0]:.2f}x", f"{ratios[len(ratios) // 2]:.2f}x", str(_slow(ratios))]
        for name, ratios in _slow_kinds(rows).items()
    ]
    outcome = wrapped(f"{_outcome(rows)}. Each case counts in the first row that it belongs to:")
    parts = [outcome, markdown(header, common), "By kind of work:", _by_work(rows), wrapped(_measured_on(rows))]
    if on_zen4 := _grid("zen4"):
        parts.append(wrapped(f"The same cases on Zen 4 ({_measured_on(on_zen4)}). {_slower_kinds(on_zen4)}"))
    return "\n\n".join(parts)


def _measured_on(rows: list[dict[str, str]]) -> str:
    return caption({**rows[0], "dtype": "float32 and bfloat16"})


def _by_work(rows: list[dict[str, str]]) -> str:
    header = ["layer", "work", "dtype", "cases", "lowest", "median", "highest", "under 0.95x"]
    kinds = sorted({(row["layer"], row["work"], row["dtype"]) for row in rows})
    lines = []
    for kind in kinds:
        ratios = sorted(float(row["speedup"]) for row in rows if (row["layer"], row["work"], row["dtype"]) == kind)
        lines.append(
            [
                *kind,
                str(len(ratios)),
                *(f"{r:.2f}x" for r in (ratios[0], ratios[len(ratios) // 2], ratios[-1])),
                str(_slow(ratios)),
            ]
        )
    return markdown(header, lines)


def roofline_table() -> str:
    path = RESULTS / "roofline.csv"
    if not path.exists():
        return ""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    header = [name for name in rows[0] if name not in ENVIRONMENT and name != "peaks"]
    lines = ([row[name] for name in header] for row in rows)
    where = wrapped(f"{caption(rows[0])}; {rows[0]['peaks']}")
    return f"{where}\n\n{markdown(header, lines)}"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose first mention of a layer or network is the only one."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    last = None
    for first, *rest in rows:
        lines.append([first if first != last else "", *rest])
        last = first
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
