"""The runs behind a table: gathered into one file, which holds a row for each of their epochs."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from sparsekern.paper import checkpoint, options, results
from sparsekern.paper.networks import Published, build
from sparsekern.paper.results import ConfigurationMismatch, DamagedResult, Result
from sparsekern.paper.train import RUNS, add_machine_arguments, default_path, load_data, log_folder, train
from sparsekern.paper.training import Configuration, best_epoch


def add_arguments(parser: argparse.ArgumentParser, seeds: str = "42-51") -> None:
    parser.add_argument(
        "--seeds", type=options.seeds, default=options.seeds(seeds), metavar="A-B", help=f"default: {seeds}"
    )
    parser.add_argument("--finished", action="store_true", help="train nothing: only the runs that are finished")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")
    add_machine_arguments(parser)


def gather(path: Path, configurations: list[Configuration], obtain: Callable, report) -> None:
    """Sees to it that a table's file holds these runs: adds what ``obtain(configuration)`` returns for those it lacks.

    Raises:
        ConfigurationMismatch: the file, or a run, is of another configuration.
        DamagedResult: the file is not whole.
    """
    try:
        table = results.read(path)
    except FileNotFoundError:
        table = Result({"data": None, "runs": {}}, [], {})
    for c in configurations:
        if c.label in table.configuration["runs"]:
            results.check_configuration(path, table.configuration["runs"][c.label], c.shared())
    there = {(row["run"], row["seed"]) for row in table.rows}
    missing = [c for c in configurations if (c.label, str(c.seed)) not in there]
    added = [(c, result) for c in missing if (result := obtain(c))]
    for c, result in added:
        data = result.configuration["data"]
        if table.configuration["data"] not in (None, data):
            raise ConfigurationMismatch(f"{path} holds results on other data than those of {c.label}, seed {c.seed}")
        table.configuration["data"] = data
        table.configuration["runs"][c.label] = c.shared()
        table.environment = result.environment
        table.rows += result.rows
    if added:
        results.write(path, table)
        report(f"{how_many(len(added))} added to {path}")
    if len(added) < len(missing):
        report(f"{len(missing) - len(added)} of {len(configurations)} runs are not finished")


def obtainer(arguments: argparse.Namespace, out: Console) -> Callable[[Configuration], Result | None]:
    """A function that returns a run's result: from its file, or after training it."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def obtain(configuration: Configuration) -> Result | None:
        path = default_path(configuration, arguments.runs)
        set_aside_if_damaged(path, configuration, out.print)
        if path.exists():
            return results.read(path)
        if arguments.finished:
            return None
        data = load_data(configuration.network.data_set, arguments, configuration.seed, arguments.device)
        result = train(configuration, data, path, out, device=arguments.device)
        if result is None:
            raise KeyboardInterrupt
        return result

    return obtain


def set_aside_if_damaged(path: Path, configuration: Configuration, report=print) -> None:
    """Renames a run's file to ``NAME.damaged`` where it is not whole, so that the run is taken up again.

    Raises:
        ConfigurationMismatch: the file is of another configuration.
    """
    try:
        found = results.read(path).configuration
    except FileNotFoundError:
        return
    except DamagedResult as damage:
        path.replace(path.with_name(path.name + ".damaged"))
        report(f"{damage}; set aside as {path.name}.damaged")
    else:
        results.check_configuration(path, {**found, "data": None}, {**asdict(configuration), "data": None})


def finished_model(configuration: Configuration, data, folder: Path, report=print) -> nn.Sequential | None:
    """The network of a finished run after its last epoch, on the CPU; None where there is none, or it does not fit."""
    path = default_path(configuration, folder)
    if not path.exists():
        return None
    state = checkpoint.load(log_folder(path), report=report)
    if state is None or state["epoch"] < configuration.network.epochs:
        return None
    there, here = state["identity"], configuration.identity(data)
    results.check_configuration(log_folder(path), {**there, "device": None}, {**here, "device": None})
    model = build(configuration.network, group_size=configuration.group_size)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        report(f"{log_folder(path)}: left out, another version of sparsekern named its layers otherwise")
        return None
    return model


def rows_by_run(rows: Iterable[dict]) -> dict[str, dict[str, list[dict]]]:
    """A table's rows by run and seed: the epochs of each, in order."""
    runs: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        runs.setdefault(row["run"], {}).setdefault(row["seed"], []).append(row)
    return runs


def rows(by_run: dict) -> Iterator[dict]:
    return (row for seeds in by_run.values() for epochs in seeds.values() for row in epochs)


def samples(by_run: dict) -> int:
    """How many samples a noise level was tested on."""
    return int(next(rows(by_run))["samples"])


def minutes(seeds: dict[str, list[dict]]) -> list[float]:
    """What each run took to train and to test, of a network's rows by seed."""
    return [
        sum(float(row[name]) for row in epochs for name in ("train_seconds", "test_seconds")) / 60
        for epochs in seeds.values()
    ]


def machines(by_run: dict) -> str:
    """What the runs were made on."""
    found = {f"{row['device']}, {how_many(row['threads'], 'thread')}" for row in rows(by_run)}
    return " and ".join(sorted(found))


@dataclass
class Scores:
    """The scores of a network's runs, one a seed: test scores in percent and noise scores as counts."""

    test: list[float]
    noise: list[int]
    samples: int

    @classmethod
    def read(cls, seeds: dict[str, list[dict]], choose: Callable[[list[dict]], dict]) -> Scores:
        """Of the epoch that ``choose`` picks of each run."""
        epochs = [choose(epochs) for epochs in seeds.values()]
        test = [100 * float(epoch["test_accuracy"]) for epoch in epochs]
        return cls(test, [int(epoch["noise_score"]) for epoch in epochs], int(epochs[0]["samples"]))


READINGS = {"best epoch": best_epoch, "last epoch": lambda epochs: epochs[-1]}


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """The mean and the sample's standard deviation, which is nan of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def deviations(ours: list[float], theirs: float, std: float) -> str:
    """How far our mean lies from the paper's, in the paper's standard deviations."""
    return f"{(statistics.fmean(ours) - theirs) / std:+.1f}"


def noise_unit(samples: int, published: Published | None, levels: int) -> tuple[Callable, Callable]:
    """How noise scores are written, ours and the paper's: as counts, or, where the test sets differ, in percent."""
    if published is None or published.samples == samples:
        return _count, _count
    return _percent_of(samples * levels), _percent_of(published.samples * levels)


def how_many(count: int | str, what: str = "run") -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {what}" if int(count) == 1 else f"{count} {what}s"


def shown(label: str) -> str:
    """A run's name for readers: ``sparseCNN2-g16`` is ``sparseCNN2 G=16``."""
    return re.sub(r"-g(\d+)$", r" G=\1", label)


def plus_minus(mean: float, std: float, unit: str = ".2f") -> str:
    """A mean and its standard deviation, where there is one."""
    return format(mean, unit) + ("" if math.isnan(std) else f" ± {format(std, unit)}")


def _count(mean: float, std: float) -> str:
    return plus_minus(mean, std, ",.0f")


def _percent_of(tries: int) -> Callable[[float, float], str]:
    return lambda mean, std: plus_minus(100 * mean / tries, 100 * std / tries, ".1f") + " %"
