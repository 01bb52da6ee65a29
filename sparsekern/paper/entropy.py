"""``entropy``: how evenly the units take turns, over training: the duty cycles' entropy as a share of the highest."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from sparsekern.paper import plots, results, runs
from sparsekern.paper.progress import console
from sparsekern.paper.scores import COMMANDS

HELP = "entropy of the duty cycles over training"
NAME = "entropy"
TABLES = ("table1", "table2")
LAYERS = {"winners1": "first convolution", "winners2": "second convolution", "winners": "hidden layer"}
CAPTION = (
    "The entropy of the duty cycles after each epoch as a share of the highest, at which all units win equally often; mean "
    "over the seeds. Layers without k-winners have none."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        choices=COMMANDS,
        action="append",
        help="whose runs (default: table1 and table2, where they are there)",
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    out = console()
    for table in arguments.table or _there(arguments.out) or TABLES[:1]:  # which says that it is not there
        drawing = draw(COMMANDS[table].rows_by_run(arguments.out))
        for drawn in plots.save(drawing, stem(arguments.out, table)):
            out.print(f"drawn in {drawn}, from {COMMANDS[table].path(arguments.out)}")
    return 0


def stem(folder: Path, table: str) -> Path:
    return folder / f"{NAME}-{table}"


def show(folder: Path) -> list[Path | str]:
    drawn = {table: stem(folder, table).with_suffix(".png") for table in COMMANDS}
    parts = [
        part
        for table, path in drawn.items()
        if path.exists()
        for part in (path, f"{COMMANDS[table].title}. From {COMMANDS[table].path(folder)}.")
    ]
    return [CAPTION, *parts] if parts else []


def _there(folder: Path) -> list[str]:
    return [table for table in TABLES if COMMANDS[table].path(folder).exists()]


def draw(by_run: dict):
    """A panel a layer, a line a network; one legend beside them."""
    drawing, panels = plots.figure(len(LAYERS), width=3.8, sharey=True)
    lines = {}
    for (layer, title), axes in zip(LAYERS.items(), panels, strict=True):
        for (name, seeds), color in zip(by_run.items(), plots.COLORS, strict=False):
            shares = [share(epochs, layer) for epochs in seeds.values()]
            if all(shares):
                epochs = zip(*shares, strict=False)  # as many as the shortest run has
                means = [statistics.fmean(epoch) for epoch in epochs]
                [lines[runs.shown(name)]] = axes.plot(range(1, len(means) + 1), means, "o-", ms=3, color=color)
        axes.set(title=title, xlabel="epoch")
    panels[0].set(ylabel="entropy / highest entropy")
    drawing.legend(lines.values(), lines, loc="outside right upper", frameon=False)
    return drawing


def share(epochs: list[dict], layer: str) -> list[float]:
    """The entropy's share after each epoch; empty where the layer has no k-winners."""
    return [float(e[f"entropy {layer}"]) / float(e[f"max entropy {layer}"]) for e in epochs if e[f"entropy {layer}"]]
