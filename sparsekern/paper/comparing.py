"""Scores set against one another: differences with their tests, and orders, as far as the spread over the seeds tells."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from sparsekern.paper import runs
from sparsekern.paper.runs import READINGS, Scores, mean_and_std
from sparsekern.paper.tables import Table

LEVEL = 0.05  # of the tests, and of the intervals
MARKS = {
    "~": "the means differ by less than their combined standard error",
    "?": "one of the two is of a single run, whose spread is not known",
}


def marks(*orders: str) -> str:
    """What the marks in orders mean."""
    there = [f"`{mark}`: {meaning}" for mark, meaning in MARKS.items() if any(f" {mark} " in order for order in orders)]
    return f" ({'; '.join(there)})" if there else ""


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, which is nan of a single value."""
    mean, std = mean_and_std(values)
    return mean, std / math.sqrt(len(values))


def in_order(scores: dict[str, tuple[float, float]]) -> str:
    """Names by their means, rising, with what the spread says of each two neighbours (MARKS).

    Args:
        scores: mean and standard error by name.
    """
    names = sorted(scores, key=lambda name: scores[name][0])
    parts = names[:1]
    for low, high in pairwise(names):
        (a, error_a), (b, error_b) = scores[low], scores[high]
        error = math.hypot(error_a, error_b)
        parts += ["?" if math.isnan(error) else "~" if b - a < error else "<", high]
    return " ".join(parts)


@dataclass
class Difference:
    """A score of one run's seeds minus that of another's.

    Attributes:
        what: the runs and the score.
        kind: test or noise.
        unit: how its values are written.
        ours: the values of the second run; theirs: of the first.
        published: the paper's difference, where it has one.
    """

    what: str
    kind: str
    unit: str
    ours: list[float]
    theirs: list[float]
    published: float | None = None

    def __post_init__(self):
        (mean, error), (other, other_error) = mean_and_error(self.ours), mean_and_error(self.theirs)
        self.means = (other, mean)
        self.value = mean - other
        self.error = math.hypot(error, other_error)
        self.counts = (len(self.theirs), len(self.ours))
        self.tested = min(self.counts) > 1

    def interval(self) -> tuple[float, float]:
        """Welch's, of the difference; without spread, the difference itself."""
        if self.error == 0:
            return self.value, self.value
        return self._welch().confidence_interval(1 - LEVEL)

    def _welch(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of seeds whose scores are equal
            return _stats().ttest_ind(self.ours, self.theirs, equal_var=False)

    def cells(self) -> list[str]:
        low, high = self.interval()
        return [
            self.what,
            *(format(mean, self.unit) for mean in self.means),
            format(self.value, "+" + self.unit),
            f"{low:+{self.unit}} to {high:+{self.unit}}",
            f"{self._welch().pvalue:.3f}" if self.error else "-",
            f"{_stats().mannwhitneyu(self.ours, self.theirs).pvalue:.3f}",
        ]


def table(title: str, names: tuple[str, str], differences: list[Difference], notes: list[str]) -> Table:
    """The differences that can be tested; the paper's in a last column where it has any."""
    differences = [difference for difference in differences if difference.tested]
    columns = ["score", *names, "difference", "95 % interval", "p (Welch)", "p (rank sum)"]
    rows = [difference.cells() for difference in differences]
    if any(difference.published is not None for difference in differences):
        columns.append("difference in the paper")
        for row, difference in zip(rows, differences, strict=True):
            row.append("-" if difference.published is None else f"{difference.published:+{difference.unit}}")
    return Table(title, columns, rows, [note for note in notes if note])


def power(differences: list[Difference]) -> str:
    """What the tests of a table can decide."""
    differences = [difference for difference in differences if difference.tested]
    parts = []
    for a, b in sorted({difference.counts for difference in differences}):
        least = min(1.0, 2 / math.comb(a + b, a))  # one run's values all below the other's, on either side
        verdict = f", so that it cannot decide at {100 * LEVEL:.0f} %" if least > LEVEL else ""
        parts.append(f"With {a} and {b} runs the rank-sum p cannot fall below {least:.2g}{verdict}.")
    tests = 2 * len(differences)
    return " ".join(
        [
            *parts,
            f"The table holds {tests} tests, two of each difference; where scores are equal, one test in {1 / LEVEL:.0f} "
            f"falls below {100 * LEVEL:.0f} % by chance.",
        ]
    )


def ruled_out(differences: list[Difference]) -> str:
    """The losses that none of the intervals leaves possible."""
    parts = []
    for kind in ("test", "noise"):
        tested = [d for d in differences if d.tested and d.kind == kind]
        if tested:
            low, unit = min((d.interval()[0], d.unit) for d in tested)
            points = "" if unit == ",.0f" else " points"
            parts.append(f"of more than {format(max(0.0, -low), unit)}{points} in the {kind} score")
    return f"The 95 % intervals all rule out a loss {' and '.join(parts)}."


def verdict(differences: list[Difference], kind: str) -> str:
    """In how many of the tested differences of a kind the second run is better or worse, here and in the paper."""
    tested = [d for d in differences if d.tested and d.kind == kind]
    better = sum(d.value >= d.error for d in tested)
    worse = sum(-d.value >= d.error for d in tested)
    text = (
        f"{kind.capitalize()} score: of {runs.how_many(len(tested), 'comparison')}, {better} higher and {worse} lower by "
        f"more than the combined standard error, {len(tested) - better - worse} within it"
    )
    published = [d.published for d in tested if d.published is not None]
    if not published or min(published) <= 0:
        return text + "."
    seen = "seen here too" if better == len(tested) else "seen here in part" if better else "not seen here"
    return f"{text}; the paper's gain, all of {len(published)} higher, is {seen}."


def differences(
    pairs: list[tuple[str, str]],
    by_run: dict,
    readings: list[str],
    noise: tuple[str, Callable[[Scores], list[float]]],
    published: dict | None = None,
    named: Callable[[str, str], str] = "{1} against {0}".format,
) -> list[Difference]:
    """The differences of the second run of each pair from the first, reading by reading.

    Args:
        pairs: of runs, of which both are there.
        by_run: the rows by run and seed.
        readings: of READINGS.
        noise: how noise scores are written, and what makes them of a run's scores.
        published: the paper's (test, noise) by run, in the same units.
        named: what a pair is called.
    """
    unit, values = noise
    found = []
    for first, second in pairs:
        for reading in readings:
            a, b = (Scores.read(by_run[run], READINGS[reading]) for run in (first, second))
            for kind, i, format_, of in (("test", 0, ".2f", lambda s: s.test), ("noise", 1, unit, values)):
                theirs = None
                if published and first in published and second in published:
                    theirs = published[second][i] - published[first][i]
                what = f"{named(runs.shown(first), runs.shown(second))}: {kind}, {reading}"
                found.append(Difference(what, kind, format_, of(b), of(a), theirs))
    return found


def _stats():
    try:
        from scipy import stats
    except ImportError:
        raise ValueError(
            "wants scipy for the significance tests; run: pip install -e '.[paper]' in a checkout"
        ) from None
    return stats
