"""What the commands of simulated figures have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsekern.paper import options, plots, results
from sparsekern.paper.progress import console


@dataclass(frozen=True)
class SimulatedFigure:
    """A figure of simulated points, made once.

    Attributes:
        parameters: what decides the points besides the number of trials and the seed.
        simulate: called with both and a console; returns a row a point.
        draw: called with the result; returns the figure.
        note: says what is seen; ``{trials}`` stands for their number.
    """

    name: str
    HELP: str
    parameters: dict
    simulate: Callable[..., list[dict]]
    draw: Callable
    note: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--trials", type=options.at_least(1), default=1_000_000, metavar="N", help="a point (default: 1,000,000)"
        )
        parser.add_argument("--seed", type=int, default=42, help="of the simulation (default: 42)")
        parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")

    def run(self, arguments: argparse.Namespace) -> int:
        out = console()
        result = results.made_once(
            self.path(arguments.out),
            {**self.parameters, "trials": arguments.trials, "seed": arguments.seed},
            lambda: self.simulate(arguments.trials, arguments.seed, out),
            report=out.print,
        )
        for drawn in plots.save(self.draw(result), arguments.out / self.name):
            out.print(f"drawn in {drawn}")
        return 0

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def show(self, folder: Path) -> list[Path | str]:
        path = self.path(folder)
        trials = results.read(path).configuration["trials"]
        return [folder / f"{self.name}.png", f"{self.note.format(trials=f'{trials:,}')} From {path}."]
