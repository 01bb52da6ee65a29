"""``batchnorm``: why batch norm fails under Gaussian noise: the same weights by training's statistics and by the test's."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from sparsekern.paper import results, runs
from sparsekern.paper.evaluate import BATCH, correct_by_noise_level
from sparsekern.paper.networks import discussion, networks
from sparsekern.paper.progress import console, progress_bar
from sparsekern.paper.runs import mean_and_std, plus_minus
from sparsekern.paper.tables import Table
from sparsekern.paper.train import load_data
from sparsekern.paper.training import Configuration

HELP = "why batch norm fails under Gaussian noise"
NAME = "batchnorm"
NETWORK = "batch-norm"
READINGS = {"running": "running averages of training", "batch": f"each test batch of {BATCH}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, seeds="42-44")


def run(arguments: argparse.Namespace) -> int:
    out = console()
    network = networks("gaussian")[NETWORK]
    configurations = [Configuration(network, seed, device=arguments.device) for seed in arguments.seeds]
    finished = runs.obtainer(arguments, out)
    runs.gather(path(arguments.out), configurations, partial(obtain, finished, arguments, out), out.print)
    for table in show(arguments.out):
        table.print(out)
    return 0


def path(folder: Path) -> Path:
    return folder / f"{NAME}.csv"


def obtain(finished: Callable, arguments: argparse.Namespace, out: Console, configuration: Configuration):
    """What a run's network does by both statistics; None where the run is not finished."""
    if finished(configuration) is None:
        return None
    data = load_data("gaussian", arguments, configuration.seed, arguments.device)
    model = runs.finished_model(configuration, data, arguments.runs, out.print)
    if model is None:
        return None
    rows = [{"run": configuration.label, "seed": configuration.seed, **row} for row in compare(model, data, out)]
    return results.Result(configuration.identity(data), rows, results.environment(arguments.device))


def compare(model: nn.Sequential, data, out: Console) -> list[dict]:
    """A row a noise level: correct test samples by each reading, and how far the inputs of each norm have moved."""
    model = model.to(data.test_labels.device)
    correct = {}
    for reading, variant in (("running", model), ("batch", by_batch_statistics(model))):
        with progress_bar(out) as bar:
            task = bar.add_task(f"by {READINGS[reading]}", total=len(data.noise_levels))
            advance = partial(_advance, bar, task)
            correct[reading] = correct_by_noise_level(variant, data, advance)
    return [
        {
            "s": f"{s:.2f}",
            "samples": len(data.test_labels),
            **{reading: counts[i] for reading, counts in correct.items()},
            **{f"shift {name}": f"{moved:.3f}" for name, moved in shifts(model, data, s).items()},
        }
        for i, s in enumerate(data.noise_levels)
    ]


def _advance(bar, task, done: int, of: int) -> None:
    bar.update(task, completed=done, total=of)


def by_batch_statistics(model: nn.Sequential) -> nn.Sequential:
    """A copy whose batch norms have no running averages, and so normalise by the batch in eval mode too."""
    model = copy.deepcopy(model)
    for layer in norms(model).values():
        layer.running_mean = layer.running_var = None
    return model


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}


@torch.inference_mode()
def shifts(model: nn.Sequential, data, s: float) -> dict[str, float]:
    """How far the inputs' mean is from the running average in each norm: mean over channels, in standard deviations."""
    moved = {}

    def measure(norm: nn.Module, arguments: tuple[Tensor], name: str) -> None:
        [x] = arguments
        mean = x.mean([d for d in range(x.dim()) if d != 1])
        moved[name] = float(((mean - norm.running_mean).abs() / norm.running_var.sqrt()).mean())

    handles = [norm.register_forward_pre_hook(partial(measure, name=name)) for name, norm in norms(model).items()]
    x, _ = next(iter(data.test_batches(s, BATCH)))
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return moved


def show(folder: Path) -> list[Table]:
    rows = results.read(path(folder)).rows
    levels = list(dict.fromkeys(row["s"] for row in rows))
    at = {s: [row for row in rows if row["s"] == s] for s in levels}
    lines = [
        [what, *(_mean([100 * int(row[reading]) / int(row["samples"]) for row in at[s]], ".1f") for s in levels)]
        for reading, what in READINGS.items()
    ]
    layers = {"norm1": "first convolution", "norm2": "second convolution", "norm": "hidden layer"}
    lines += [
        [f"offset, {what}", *(_mean([float(row[f"shift {name}"]) for row in at[s]], ".2f") for s in levels)]
        for name, what in layers.items()
        if f"shift {name}" in rows[0]
    ]
    seeds = runs.how_many(len(at[levels[0]]))
    notes = [
        f"Accuracy in % of the network `{NETWORK}` after the last epoch ({seeds}), mean ± standard deviation. Offset: "
        "how far the mean of a norm's input is from training's running average, in standard deviations, averaged over "
        "channels.",
        why(at[levels[-1]], [name for name in layers if f"shift {name}" in rows[0]]),
        f"From {path(folder)}.",
    ]
    return [
        Table(
            "Batch norm under Gaussian noise, by the statistics of ...",
            ["", *(f"s = {float(s):.1f}" for s in levels)],
            lines,
            notes,
        )
    ]


def why(strongest: list[dict], layers: list[str]) -> str:
    """What happens at the strongest noise, whose rows these are."""
    kept = {
        reading: _mean([100 * int(row[reading]) / int(row["samples"]) for row in strongest], ".1f")
        for reading in READINGS
    }
    offsets = ", ".join(f"{mean_and_std([float(row[f'shift {name}']) for row in strongest])[0]:.2f}" for name in layers)
    low, high = discussion()[NETWORK]
    return (
        "Noise brightens the images, since pixels are cut off at 0 and most are black. So each norm gets inputs that "
        "training's running averages do not fit, and passes the offset on to the next one: at "
        f"s = {float(strongest[0]['s']):.1f} the means are off by {offsets} standard deviations, and "
        f"{kept['running']} % of the images are right, where naming one class for every image gives about 10 %. By the "
        "statistics of the test batch, which take the offset out again, the same weights get "
        f"{kept['batch']} % right. The discussion has {low:.0f} to {high:.0f} %."
    )


def _mean(values: list[float], unit: str) -> str:
    return plus_minus(*mean_and_std(values), unit)
