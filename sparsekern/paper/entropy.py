"""``entropy``: how evenly the units take turns, over training: the duty cycles' entropy as a share of the highest."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from sparsekern.paper import plots, results
from sparsekern.paper.progress import console
from sparsekern.paper.scores import COMMANDS

HELP = "entropy of the duty cycles over training"
NAME = "entropy"
LAYERS = {"winners1": "first convolution", "winners2": "second convolution", "winners": "hidden layer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", choices=COMMANDS, default="table1", help="whose runs (default: table1)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    out = console()
    path = COMMANDS[arguments.table].path(arguments.out)
    drawing = draw(COMMANDS[arguments.table].rows_by_run(arguments.out))
    for drawn in plots.save(drawing, arguments.out / f"{NAME}-{arguments.table}"):
        out.print(f"drawn in {drawn}, from {path}")
    return 0


def show(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{NAME}-*.png"))


def draw(by_run: dict):
    drawing, panels = plots.figure(len(LAYERS), width=4.2, sharey=True)
    for (layer, title), axes in zip(LAYERS.items(), panels, strict=True):
        for (name, seeds), color in zip(by_run.items(), plots.COLORS, strict=False):
            shares = [share(epochs, layer) for epochs in seeds.values()]
            if all(shares):
                epochs = zip(*shares, strict=False)  # as many as the shortest run has
                means = [statistics.fmean(epoch) for epoch in epochs]
                axes.plot(range(1, len(means) + 1), means, "o-", ms=3, color=color, label=name)
        axes.set(title=title, xlabel="epoch")
        if axes.lines:
            axes.legend()
    panels[0].set(ylabel="entropy / highest entropy")
    return drawing


def share(epochs: list[dict], layer: str) -> list[float]:
    """The entropy's share after each epoch; empty where the layer has no k-winners."""
    return [float(e[f"entropy {layer}"]) / float(e[f"max entropy {layer}"]) for e in epochs if e[f"entropy {layer}"]]
