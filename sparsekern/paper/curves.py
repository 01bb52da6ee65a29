"""Accuracy against noise: a network's curve, and the curves of several as a plot."""

from __future__ import annotations

from sparsekern.paper import plots
from sparsekern.paper.runs import mean_and_std


def of_run(seeds: dict[str, list[dict]], levels: list[str]) -> list[tuple[float, float]]:
    """Mean and standard deviation of the accuracy in percent after the last epoch, at each noise level."""
    return [mean_and_std(accuracies(seeds, eta)) for eta in levels]


def accuracies(seeds: dict[str, list[dict]], level: str) -> list[float]:
    """The accuracy of each seed in percent after the last epoch, at a noise level."""
    last = [epochs[-1] for epochs in seeds.values()]
    return [100 * int(row[f"correct {level}"]) / int(row["samples"]) for row in last]


def draw(curves: dict, levels: list[float], xlabel: str, axes=None):
    """Accuracy against noise, a line a network, the seeds' standard deviation as a band."""
    drawing = None
    if axes is None:
        drawing, axes = plots.figure(width=7.6)
    for (name, curve), color in zip(curves.items(), plots.COLORS, strict=False):
        low, means, high = zip(*((mean - std, mean, mean + std) for mean, std in curve), strict=True)
        axes.plot(levels, means, "o-", ms=3, color=color, label=name)
        axes.fill_between(levels, low, high, color=color, alpha=0.15, lw=0)
    axes.set(xlabel=xlabel, ylabel="accuracy, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # beside the curves
    return drawing
