"""The speed-ups as a picture: a bar for each case on a logarithmic axis, marks for further rivals and for the savings."""

from __future__ import annotations

from pathlib import Path

from report import FLOOR, OTHERS, Result, caption

FASTER, SLOWER, INK, PALE = "#2a6f97", "#c8553d", "#333333", "#dddddd"
MARKS = {
    "plain": ("D", "over plain PyTorch"),
    "bf16": ("o", "over dense bfloat16"),
    "CSR": ("s", "over torch.sparse CSR"),
}
HOLLOW = {"markerfacecolor": "white", "markeredgecolor": INK, "markersize": 4.5, "markeredgewidth": 0.9}
TICK = {"color": INK, "markersize": 9, "markeredgewidth": 1.6}


def plot(path: Path, results: list[Result], where: dict[str, str]) -> None:
    """Draws the results; the ending of the name (.png, .svg) decides the format. The file says what it was drawn from."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsekern", "font.size": 9, "text.color": INK})
    from matplotlib import pyplot

    positions, headings = _positions(results)
    height = 1.8 + 0.2 * -positions[-1]
    figure, axes = pyplot.subplots(figsize=(10, height))
    for result, y in zip(results, positions, strict=True):
        _draw(axes, result, y)
    _axis(axes, results, positions, headings)
    axes.set_title(f"Speed-up over dense PyTorch ({where['dtype']})", loc="left", fontsize=13, weight="bold", pad=40)
    axes.set_xlabel(caption(where), fontsize=7.5, labelpad=8)
    _legend(axes, results, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Description": caption(where), **({"Date": None} if path.suffix == ".svg" else {})}
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    pyplot.close(figure)


def _draw(axes, result: Result, y: float) -> None:
    """The bar, its figure in a column at the right, and the marks."""
    speedup = result.speedup()
    color = FASTER if speedup >= FLOOR else SLOWER
    axes.barh(y, speedup - 1, left=1, height=0.72, color=color)
    axes.text(
        1.01, y, f"{speedup:.{1 if speedup >= 10 else 2}f}x", va="center", weight="bold", color=color,
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    for role in result.roles():
        if role in OTHERS:
            axes.plot(result.speedup(role), y, MARKS[role][0], **HOLLOW)
    if result.savings and result.savings > 1:
        axes.plot(result.savings, y, "|", **TICK)


def _positions(results: list[Result]) -> tuple[list[float], list[tuple[float, str]]]:
    """The height of each bar, downwards, and of a heading above each case's first one."""
    positions, headings, y, last = [], [], 0.0, None
    for result in results:
        if result.case != last:
            y -= 1.9
            headings.append((y + 1, result.case))
            last = result.case
        positions.append(y)
        y -= 1
    return positions, headings


def _axis(axes, results, positions, headings) -> None:
    axes.set_xscale("log")
    speeds = [result.speedup(role) for result in results for role in result.roles()]
    speeds += [result.savings or 1 for result in results]
    axes.set_xlim(min(0.5, 0.8 * min(speeds)), 1.5 * max(speeds))
    axes.axvline(1, color=INK, linewidth=1)
    axes.text(1, 1.0, "dense = 1x", ha="center", va="bottom", fontsize=8, transform=axes.get_xaxis_transform())
    axes.xaxis.set_major_locator(_steps())
    axes.xaxis.set_minor_locator(_no_steps())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(positions, [f"{result.work}, B={result.batch}" for result in results])
    axes.set_ylim(min(positions) - 0.8, 0)
    for y, text in headings:
        axes.text(-0.005, y, text, ha="right", va="center", weight="bold", transform=axes.get_yaxis_transform())
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _steps():
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5), numticks=20)


def _no_steps():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _legend(axes, results, height) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = {role for result in results for role in result.roles()}
    handles = [Patch(color=FASTER, label="over dense")]
    for role, (mark, label) in MARKS.items():
        if role in shown:
            handles.append(Line2D([], [], linestyle="", marker=mark, label=label, **HOLLOW))
    handles.append(Line2D([], [], linestyle="", marker="|", label="savings in products", **TICK))
    above = (-0.005, 1 + 0.28 / height)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=above, borderaxespad=0, borderpad=0, ncols=len(handles),
        frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.6,
    )  # fmt: skip
