"""The speed-ups as a picture: a bar for each comparison on a logarithmic axis, a tick where all savings were realised."""

from __future__ import annotations

from pathlib import Path

from report import Result

FASTER, SLOWER, INK = "#2a6f97", "#c8553d", "#333333"


def plot(path: Path, results: list[Result], where: dict[str, str]) -> None:
    """Draws the results; the ending of the name (.png, .svg) decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsekern", "font.size": 9, "text.color": INK})
    from matplotlib import pyplot

    bars = [(result, role) for result in results for role in result.roles()]
    positions, headings = _positions(bars)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.21 * (len(bars) + 1.6 * len(headings))))
    for (result, role), y in zip(bars, positions, strict=True):
        speedup = result.speedup(role)
        axes.barh(y, speedup - 1, left=1, height=0.72, color=FASTER if speedup >= 1 else SLOWER)
        axes.annotate(
            f"{speedup:.3g}x", (speedup, y), (4 if speedup >= 1 else -4, 0), textcoords="offset points",
            va="center", ha="left" if speedup >= 1 else "right", fontsize=8,
        )  # fmt: skip
        if result.savings and result.savings > 1:
            axes.plot(result.savings, y, "|", color=INK, markersize=8)
    _axis(axes, bars, positions, headings)
    axes.set_title("Speed-up over dense PyTorch, and (ticks) the savings in products", loc="left", fontsize=11)
    axes.set_xlabel(
        f"{where['hardware']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}, {where['date']}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _positions(bars) -> tuple[list[float], list[tuple[float, str]]]:
    """The height of each bar, downwards, and of a heading above each case's first one."""
    positions, headings, y, last = [], [], 0.0, None
    for result, _ in bars:
        if result.case != last:
            y -= 1.6
            headings.append((y + 0.95, result.case))
            last = result.case
        positions.append(y)
        y -= 1
    return positions, headings


def _axis(axes, bars, positions, headings) -> None:
    axes.set_xscale("log")
    speeds = [result.speedup(role) for result, role in bars] + [result.savings or 1 for result, _ in bars]
    axes.set_xlim(min(0.5, 0.7 * min(speeds)), 1.8 * max(speeds))
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(positions, [_label(result, role) for result, role in bars])
    axes.set_ylim(min(positions) - 1, 0)
    for y, text in headings:
        axes.text(-0.005, y, text, ha="right", va="center", weight="bold", transform=axes.get_yaxis_transform())
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _label(result: Result, role: str) -> str:
    against = f", against {role}" if len(result.roles()) > 1 else ""
    return f"{result.work}, B={result.batch}{against}"
