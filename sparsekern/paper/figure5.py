"""``figure5``: test images at several noise levels, and the networks' accuracy at every one."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsekern.paper import curves, plots, results, runs
from sparsekern.paper.mnist import NOISE_LEVELS, Mnist
from sparsekern.paper.progress import console
from sparsekern.paper.scores import COMMANDS

HELP = "noisy test images, and accuracy against noise for the networks of Table 1"
NAME = "figure5"
SHOWN = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
IMAGES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of MNIST's files")
    parser.add_argument("--download", action="store_true", help="get the files that are not there")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    out = console()
    path = COMMANDS["table1"].path(arguments.out)
    by_run = COMMANDS["table1"].rows_by_run(arguments.out)
    data = Mnist(arguments.data, fetch=arguments.download)
    layout = [[f"{row} {column}" for column in range(len(SHOWN))] + ["curves"] for row in range(IMAGES)]
    drawing, axes = plots.mosaic(layout, width=12, height=4.2, width_ratios=[1] * len(SHOWN) + [9])
    draw_images(axes, data)
    levels = [f"{eta:.2f}" for eta in NOISE_LEVELS]
    lines = {runs.shown(name): curves.of_run(seeds, levels) for name, seeds in by_run.items()}
    curves.draw(lines, NOISE_LEVELS, "noise level", axes["curves"])
    for drawn in plots.save(drawing, arguments.out / NAME):
        out.print(f"drawn in {drawn}, from {path}")
    return 0


def show(folder: Path) -> list[Path | str]:
    path = COMMANDS["table1"].path(folder)
    results.read(path)
    note = f"Accuracy after the last epoch, mean over the seeds, with their standard deviation as a band. From {path}."
    return [folder / f"{NAME}.png", note]


def draw_images(axes: dict, data: Mnist) -> None:
    low, high = data.test_images.min().item(), data.test_images.max().item()
    for column, eta in enumerate(SHOWN):
        for row, image in enumerate(data.noisy(eta, slice(0, IMAGES))):
            cell = axes[f"{row} {column}"]
            cell.imshow(image[0].numpy(), cmap="gray", vmin=low, vmax=high)
            cell.set_axis_off()
        axes[f"0 {column}"].set_title(f"{100 * eta:.0f} %", loc="center", fontsize=9)
