"""``figure2``: how likely a random binary vector matches a prototype, simulated and predicted by equation 3."""

from __future__ import annotations

import torch

from sparsekern import sdr
from sparsekern.paper import plots, results
from sparsekern.paper.progress import track
from sparsekern.paper.simulated import SimulatedFigure

S, THETA = 24, 12
ACTIVE = ["64", "128", "256", "n/2"]
DIMENSIONS = [300, 500, 700, 900, 1100, 1300, 1500, 1900, 2300, 2700, 3100, 3500]


def active(name: str, n: int) -> int:
    """The number of active bits that a curve's name stands for."""
    return n // 2 if name == "n/2" else int(name)


def simulate(trials: int, seed: int, out) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    points = [(name, n) for name in ACTIVE for n in DIMENSIONS]
    return [
        {
            "a": name,
            "n": n,
            "simulated": sdr.simulate_binary(n, active(name, n), S, THETA, trials=trials, generator=generator),
            "predicted": sdr.match_probability(n, active(name, n), S, THETA),
        }
        for name, n in track(points, "simulating", out)
    ]


def draw(result: results.Result):
    drawing, axes = plots.figure(width=6.4)
    for name, color in zip(ACTIVE, plots.COLORS, strict=False):
        curve = range(DIMENSIONS[0], DIMENSIONS[-1] + 1, 20)
        predicted = [sdr.match_probability(n, active(name, n), S, THETA) for n in curve]
        axes.plot(curve, predicted, ":", color=color)
        axes.annotate(
            f"a = {name}", (curve[-1], predicted[-1]), (4, 0), textcoords="offset points", va="center", color=color
        )
        points = [row for row in result.rows if row["a"] == name and float(row["simulated"]) > 0]
        axes.plot(
            [int(row["n"]) for row in points], [float(row["simulated"]) for row in points], "o", mfc="none", color=color
        )
    trials = result.configuration["trials"]
    axes.axhline(1 / trials, color="grey", lw=0.8)
    axes.annotate(
        f"one match in {trials:,} trials", (1500, 1 / trials), (0, 3), textcoords="offset points", color="grey", size=8
    )
    axes.set(
        yscale="log",
        xlabel="dimension n",
        ylabel="probability of a false match",
        title=f"Binary vectors: {S} active bits, threshold {THETA}\n(circles simulated, lines equation 3)",
        xlim=(DIMENSIONS[0] - 100, DIMENSIONS[-1] + 450),
    )
    return drawing


COMMAND = SimulatedFigure(
    "figure2",
    "false matches of binary vectors: simulated circles on predicted lines",
    {"s": S, "theta": THETA, "n": DIMENSIONS},
    simulate,
    draw,
    "Circles: {trials} random vectors each; lines: equation 3, exact; the paper's parameters.",
)
