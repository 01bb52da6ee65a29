"""``table1``, ``table2`` and ``gaussian``: networks trained on several seeds and tested at every noise level."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

from sparsekern.paper import comparing, curves, options, plots, results, runs
from sparsekern.paper.comparing import Difference, in_order, marks, mean_and_error
from sparsekern.paper.datasets import DATA_SETS
from sparsekern.paper.networks import Published, discussion, networks, published
from sparsekern.paper.progress import console
from sparsekern.paper.runs import READINGS, Scores, mean_and_std, plus_minus
from sparsekern.paper.speech import PART_MD5, PART_WORDS
from sparsekern.paper.tables import Table
from sparsekern.paper.training import Configuration

PAPER_SEEDS = 10  # of each network in the paper's tables
FAST_LAYOUT = 16  # the group size that is compared with the paper's 1


@dataclass(frozen=True)
class ScoreCommand:
    """A table of one data set's networks.

    Attributes:
        grouped: the networks that are also trained in the fast layout, whose scores are compared.
        dense_and_sparse: the networks that are set against one another.
    """

    name: str
    data_set: str
    HELP: str
    title: str
    seeds: str = "42-51"
    grouped: tuple[str, ...] = ()
    dense_and_sparse: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        runs.add_arguments(parser, self.seeds)
        parser.add_argument(
            "--group-size", type=options.at_least(1), default=FAST_LAYOUT, metavar="G", help="beside 1 (default: 16)"
        )

    def configurations(
        self, seeds: list[int], group_size: int = FAST_LAYOUT, device: str = "cpu"
    ) -> list[Configuration]:
        known = networks(self.data_set)
        wanted = [(network, 1) for network in known.values()] + [(known[name], group_size) for name in self.grouped]
        return [Configuration(network, seed, size, device=device) for network, size in wanted for seed in seeds]

    def run(self, arguments: argparse.Namespace) -> int:
        out = console()
        configurations = self.configurations(arguments.seeds, arguments.group_size, arguments.device)
        runs.gather(self.path(arguments.out), configurations, runs.obtainer(arguments, out), out.print)
        for drawn in self.draw(arguments.out):
            out.print(f"drawn in {drawn}")
        for table in self.show(arguments.out):
            if isinstance(table, Table):
                table.print(out)
        return 0

    def draw(self, folder: Path) -> list[Path]:
        """The plots of the result file that the command writes."""
        return []

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def rows_by_run(self, folder: Path) -> dict[str, dict[str, list[dict]]]:
        """The result file's rows by run and seed, the runs in the order of the paper's table, then its fast layouts."""
        order = {name: place for place, name in enumerate(networks(self.data_set))}
        by_run = runs.rows_by_run(results.read(self.path(folder)).rows)
        return {
            run: dict(sorted(by_run[run].items())) for run in sorted(by_run, key=lambda r: order.get(r, len(order)))
        }

    def show(self, folder: Path) -> list[Table | Path]:
        """What the runs in the result file have to say."""
        path = self.path(folder)
        by_run = self.rows_by_run(folder)
        data = results.read(path).configuration["data"]
        table = self._scores(by_run)
        table.notes += [note_on_epochs(by_run), *self._notes_on_data(by_run, data), f"From {path}."]
        table.notes += self._far_off(table) + self._order(by_run)
        return [table, *self._against_dense(by_run), *self._fast_layout(by_run)]

    def _scores(self, by_run: dict) -> Table:
        columns = ["network", "runs"]
        columns += [f"{score}, best epoch{what}" for score in ("test", "noise") for what in ("", ": paper", ": off by")]
        columns += ["test, last epoch", "noise, last epoch", "minutes a run"]
        rows = [[runs.shown(name), str(len(seeds)), *self._cells(name, seeds)] for name, seeds in by_run.items()]
        empty = [i for i, name in enumerate(columns) if "off by" in name and all(row[i] == "-" for row in rows)]
        columns, *rows = ([cell for i, cell in enumerate(line) if i not in empty] for line in (columns, *rows))
        off_by = "" if empty else " Off by: our mean's distance from the paper's, in the paper's standard deviations."
        hours = sum(map(sum, map(runs.minutes, by_run.values()))) / 60
        spread = (
            "Mean ± standard deviation over the seeds: ours that of the sample (n - 1), the published one that of the "
            f"population (n).{off_by} Trained and tested on {runs.machines(by_run)}. Minutes: of "
            f"training and testing, the median; all runs one after the other take {hours:.1f} hours."
        )
        return Table(self.title, columns, rows, [spread])

    def _cells(self, name: str, seeds: dict[str, list[dict]]) -> list[str]:
        best, last = (Scores.read(seeds, choose) for choose in READINGS.values())
        theirs = published(self.data_set).get(name)
        ours_as, theirs_as = runs.noise_unit(best.samples, self._paper(), self._levels())
        test, noise = ["-", "-"], ["-", "-"]
        if theirs:
            test[0], noise[0] = plus_minus(theirs.test, theirs.test_std), theirs_as(theirs.noise, theirs.noise_std)
        if theirs and theirs.samples == best.samples:
            test[1] = runs.deviations(best.test, theirs.test, theirs.test_std)
            noise[1] = runs.deviations(best.noise, theirs.noise, theirs.noise_std)
        return [
            *(_percent(best.test), *test, ours_as(*mean_and_std(best.noise)), *noise),
            *(_percent(last.test), ours_as(*mean_and_std(last.noise)), f"{median(runs.minutes(seeds)):.1f}"),
        ]

    def _paper(self) -> Published | None:
        """A row of the paper's table, by which all are written; None of a data set that the paper has not."""
        return next(iter(published(self.data_set).values()), None)

    def _levels(self) -> int:
        return len(DATA_SETS[self.data_set].noise_levels)

    def _notes_on_data(self, by_run: dict, data: str) -> list[str]:
        """Where the data are not the paper's: what they are, and what that does to the scores."""
        samples, paper = runs.samples(by_run), self._paper()
        if paper is None or samples == paper.samples:
            return []
        part = ""
        if data == PART_MD5:
            part = (
                f"Trained on the ten-word part of the data set (about 500 clips a word, of {', '.join(PART_WORDS)}) and "
                f"tested on its {samples:,} validation clips: it has no other. "
            )
        return [
            f"{part}One clip is {100 / samples:.1f} points of the test score. The paper used the ten digits of the whole "
            f"data set (about 2,350 clips a word; {paper.samples:,} clips to test on), so that here the networks can be "
            "compared with one another, not with the paper's column. Noise scores are percentages of the clips tested at "
            f"the {self._levels()} levels."
        ]

    def _far_off(self, table: Table) -> list[str]:
        """The scores that are further than one of the paper's standard deviations from the paper's."""
        columns = [(i, name.split(",")[0]) for i, name in enumerate(table.columns) if "off by" in name]
        found = [
            f"{row[0]}'s {score} score ({row[i]})"
            for row in table.rows
            for i, score in columns
            if row[i] != "-" and abs(float(row[i])) > 1
        ]
        if not found:
            return []
        return [
            f"Off by more than one: {', '.join(found)}. Our layers compute what the plain PyTorch networks do (`--plain`), "
            "so the kernels are not the reason; it is not known."
        ]

    def _order(self, by_run: dict) -> list[str]:
        paper = {name: row for name, row in published(self.data_set).items() if name in by_run}
        if len(paper) < 2:
            return []
        best = READINGS["best epoch"]
        ours = {name: mean_and_error(Scores.read(by_run[name], best).noise) for name in paper}
        # The population's deviation of n values is the sample's by sqrt((n - 1) / n).
        theirs = {name: (row.noise, row.noise_std / math.sqrt(PAPER_SEEDS - 1)) for name, row in paper.items()}
        orders = in_order(ours), in_order(theirs)
        return ["Order by noise score, here: {}; in the paper: {}{}.".format(*orders, marks(*orders))]

    def _noise(self, by_run: dict) -> tuple[str, Callable[[Scores], list[float]]]:
        """How the noise scores of a comparison are written, and made: in percent where the paper's test set is another."""
        paper = self._paper()
        if paper is None or runs.samples(by_run) == paper.samples:
            return ",.0f", lambda scores: scores.noise
        tries = runs.samples(by_run) * self._levels()
        return ".1f", lambda scores: [100 * score / tries for score in scores.noise]

    def _against_dense(self, by_run: dict) -> list[Table]:
        """The sparse networks beside the dense ones."""
        pairs = [(dense, sparse) for dense, sparse in product(*self.dense_and_sparse) if {dense, sparse} <= {*by_run}]
        unit, _ = noise = self._noise(by_run)
        scale = 1 if unit == ",.0f" else 100 / (self._levels() * max(1, getattr(self._paper(), "samples", 1)))
        paper = {name: (row.test, scale * row.noise) for name, row in published(self.data_set).items()}
        found = comparing.differences(pairs, by_run, ["last epoch"], noise, paper)
        if not any(difference.tested for difference in found):
            return []
        notes = [
            " ".join(comparing.verdict(found, kind) for kind in ("test", "noise")),
            "Sparse minus dense, with Welch's interval; two-sided tests. " + comparing.power(found),
        ]
        return [comparing.table("Sparse against dense", ("dense", "sparse"), found, notes)]

    def _fast_layout(self, by_run: dict) -> list[Table]:
        """The fast layout beside the paper's, reading by reading."""
        pairs = [
            (name, run) for name in self.grouped if name in by_run for run in by_run if run.startswith(f"{name}-g")
        ]
        found = comparing.differences(pairs, by_run, list(READINGS), self._noise(by_run), named="{1}".format)
        if not any(difference.tested for difference in found):
            return []
        notes = [
            "Difference of the means, fast layout minus G = 1, with Welch's interval; two-sided tests.",
            f"{comparing.ruled_out(found)} {comparing.power(found)}",
        ]
        return [comparing.table("Does the fast layout keep the robustness?", ("G = 1", "fast layout"), found, notes)]


def note_on_epochs(by_run: dict) -> str:
    """What the best epoch was chosen by."""
    chosen = [(row["validation_accuracy"], row["test_accuracy"]) for row in runs.rows(by_run)]
    validated = any(validation for validation, _ in chosen)
    if validated and any(validation != test for validation, test in chosen):
        return "Best epoch: that of the best score on the validation list; beside it the last epoch."
    by = "validation score, on the clips that are the test set too" if validated else "test score, as in the paper"
    return f"Best epoch: that of the best {by}, a choice on the test set, which flatters; the last epoch is the honest one."


def _percent(values: list[float]) -> str:
    return plus_minus(*mean_and_std(values))


class GaussianCommand(ScoreCommand):
    """Accuracy at each noise level, as a table beside the discussion's figures and as a plot."""

    def draw(self, folder: Path) -> list[Path]:
        levels, drawn = self._curves(folder)
        xlabel = "s, standard deviation of the pixels' noise"
        return plots.save(curves.draw(drawn, [float(s) for s in levels], xlabel), folder / self.name)

    def show(self, folder: Path) -> list[Table | Path]:
        levels, drawn = self._curves(folder)
        theirs = {name: _range(*found) for name, found in discussion().items()}
        rows = [
            [name, *(plus_minus(mean, std, ".1f") for mean, std in curve), theirs.get(run, "-")]
            for (run, name), curve in zip(self._names(folder).items(), drawn.values(), strict=True)
        ]
        strongest = f"s = {float(levels[-1]):.1f}"
        columns = ["network", *(f"s = {float(s):.1f}" for s in levels), f"discussion, {strongest}"]
        table = Table(self.title, columns, rows)
        table.notes = [
            f"Accuracy in % after the last epoch, mean ± standard deviation. From {self.path(folder)}.",
            self._outcome(self.rows_by_run(folder), levels[-1]),
        ]
        return [table, folder / f"{self.name}.png"]

    def _outcome(self, by_run: dict, level: str) -> str:
        """The order at a noise level, here and in the discussion, whose networks and their training are not known."""
        ours = {
            self.shown(name): mean_and_error(curves.accuracies(seeds, level))
            for name, seeds in by_run.items()
            if name in discussion()
        }
        theirs = {
            self.shown(name): ((low + high) / 2, (high - low) / 2)
            for name, (low, high) in discussion().items()
            if name in by_run
        }
        boosted, unboosted = (by_run.get(name) for name in ("k-winners-boosted", "k-winners"))
        boosting = ""
        if boosted and unboosted:
            values = [curves.accuracies(seeds, level) for seeds in (boosted, unboosted)]
            gain = Difference("", "test", ".1f", *values)
            there = discussion()["k-winners-boosted"][0] - discussion()["k-winners"][0]
            error = f" ± {gain.error:.1f}, the standard error," if gain.tested else ""
            boosting = (
                f" Boosting's part in it: {round(gain.value, 1) + 0.0:+.1f} points{error} here, {there:+.0f} there."
            )
        orders = in_order(ours), in_order(theirs)
        return (
            "Order at s = {:.1f}, here: {}; in the discussion, whose networks and their training are not known: {}{}."
            "{} For batch norm see `batchnorm`."
        ).format(float(level), *orders, marks(*orders), boosting)

    def shown(self, name: str) -> str:
        return "plain (ReLU)" if name == "plain" else name

    def _names(self, folder: Path) -> dict[str, str]:
        by_run = self.rows_by_run(folder)
        return {name: f"{self.shown(name)} ({runs.how_many(len(seeds))})" for name, seeds in by_run.items()}

    def _curves(self, folder: Path) -> tuple[list[str], dict]:
        levels = [f"{s:.2f}" for s in DATA_SETS[self.data_set].noise_levels]
        by_run, names = self.rows_by_run(folder), self._names(folder)
        return levels, {names[run]: curves.of_run(seeds, levels) for run, seeds in by_run.items()}


def _range(low: float, high: float) -> str:
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


COMMANDS = {
    command.name: command
    for command in (
        ScoreCommand(
            "table1",
            "mnist",
            "the MNIST networks: test and noise scores",
            "Table 1: MNIST under noise",
            grouped=("sparseCNN2",),
        ),
        ScoreCommand(
            "table2",
            "speech",
            "the speech networks: test and noise scores",
            "Table 2: Speech Commands under noise",
            seeds="42-44",
            grouped=("sparseCNN2", "superSparseCNN2"),
            dense_and_sparse=(("denseCNN2", "denseCNN2-dropout"), ("sparseCNN2", "superSparseCNN2")),
        ),
        GaussianCommand(
            "gaussian",
            "gaussian",
            "the discussion's comparison under Gaussian pixel noise",
            "MNIST under Gaussian pixel noise",
            seeds="42-44",
        ),
    )
}
