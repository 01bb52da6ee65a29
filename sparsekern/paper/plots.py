"""What the paper's plots have in common: their look, and that each is written as PNG and SVG."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sparsekern.paper.checkpoint import write_atomically

COLORS = ["#0b5fa5", "#d1495b", "#2a9d6f", "#8a5fb4", "#e08e1b", "#4d4d4d", "#1aa6b7", "#b5838d", "#a3a847", "#12355b"]
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsekern",  # the same drawing gives the same file
}


def figure(columns: int = 1, *, width: float = 5.6, height: float = 4.0, rows: int = 1, **options):
    """A figure and its axes, in the common look."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", **options)


def mosaic(layout: list[list[str]], *, width: float, height: float, **options):
    """A figure and its axes by name, laid out as the names are, in the common look."""
    with plt.rc_context(STYLE):
        return plt.subplot_mosaic(layout, figsize=(width, height), layout="constrained", **options)


def save(drawing: Figure, stem: Path) -> list[Path]:
    """Writes ``stem.png`` and ``stem.svg`` and closes the figure; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            drawing.savefig(buffer, format=kind, metadata=metadata)
        paths.append(stem.with_suffix(f".{kind}"))
        write_atomically(paths[-1], buffer.getvalue())
    plt.close(drawing)
    return paths
