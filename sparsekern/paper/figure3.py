"""``figure3``: how likely random scalar vectors match, against their dimension and against the input's scale."""

from __future__ import annotations

import torch

from sparsekern import sdr
from sparsekern.paper import plots, results
from sparsekern.paper.figure2 import active
from sparsekern.paper.progress import track
from sparsekern.paper.simulated import SimulatedFigure

S = 32
LEFT = {"a": ["64", "128", "256", "n/2"], "n": [300, 500, 750, 1000, 1500, 2000, 2500, 3000, 3500], "scale": [1.0]}
RIGHT = {"a": ["64", "128", "256"], "n": [1000], "scale": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}


def points() -> list[tuple[str, str, int, float]]:
    """The panel, a, n and scale of each point."""
    return [
        (panel, name, n, scale)
        for panel, grid in (("left", LEFT), ("right", RIGHT))
        for name in grid["a"]
        for n in grid["n"]
        for scale in grid["scale"]
    ]


def simulate(trials: int, seed: int, out) -> list[dict]:
    """Each point twice: whole vectors, and the matches at each overlap weighted by the overlap's exact probability."""
    generator = torch.Generator().manual_seed(seed)
    by_overlap = {
        scale: sdr.scalar_match_by_overlap(S, scale=scale, trials=trials, generator=generator)
        for scale in track(RIGHT["scale"], "matches by overlap", out)
    }
    rows = []
    for panel, name, n, scale in track(points(), "simulating", out):
        a = active(name, n)
        simulated = sdr.simulate_scalar(n, a, S, scale=scale, trials=trials, generator=generator)
        predicted = sdr.scalar_match_probability(n, a, by_overlap[scale])
        rows.append({"panel": panel, "a": name, "n": n, "scale": scale, "simulated": simulated, "predicted": predicted})
    return rows


def draw(result: results.Result):
    drawing, (left, right) = plots.figure(2, width=5.2)
    for axes, panel, x in ((left, "left", "n"), (right, "right", "scale")):
        for name, color in zip(LEFT["a"], plots.COLORS, strict=False):
            rows = [row for row in result.rows if row["panel"] == panel and row["a"] == name]
            if not rows:
                continue
            axes.plot([float(row[x]) for row in rows], [float(row["predicted"]) for row in rows], ":", color=color)
            found = [row for row in rows if float(row["simulated"]) > 0]
            axes.plot(
                [float(row[x]) for row in found],
                [float(row["simulated"]) for row in found],
                "o",
                mfc="none",
                color=color,
                label=f"a = {name}",
            )
        axes.set(yscale="log", ylabel="probability of a false match")
        axes.legend()
    left.set(xlabel="dimension n", title=f"Scalar vectors: {S} non-zeros, scale S = 1")
    right.set(xlabel="scale S of the input", title="n = 1000")
    return drawing


COMMAND = SimulatedFigure(
    "figure3",
    "false matches of scalar vectors, by dimension and by the input's scale",
    {"s": S, "left": LEFT, "right": RIGHT},
    simulate,
    draw,
    "Circles: {trials} pairs of random vectors each; dotted lines: the simulated matches at each overlap, weighted by the "
    "overlap's exact probability; the paper's parameters.",
)
