"""``train NAME``: trains one of the paper's networks and tests it at every noise level after each epoch."""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparsekern.paper import distributed
from sparsekern.paper.datasets import DATA_SETS
from sparsekern.paper.networks import networks
from sparsekern.paper.progress import console, progress_bar
from sparsekern.paper.training import LOG, Configuration, Run, best_epoch

HELP = "train a network and test it under noise"
PROGRESS_SECONDS = 0.2  # between updates of the bar, which cost more than a step of a small batch
RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = {name: ", ".join(networks(name)) for name in DATA_SETS}
    parser.add_argument("name", metavar="NAME", help="; ".join(f"{key}: {value}" for key, value in names.items()))
    parser.add_argument("--data-set", choices=DATA_SETS, default="mnist", help="default: mnist")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--download", action="store_true", help="get the files that are not there")
    parser.add_argument("--epochs", type=int, metavar="N", help="by default as many as in the paper")
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints, log and result; by default runs/...")
    parser.add_argument("--seed", type=int, default=42, help="of weights, data order and noise (default: 42)")
    parser.add_argument(
        "--group-size", type=int, default=1, metavar="G", help="units that share a support (default: 1)"
    )
    twin = parser.add_mutually_exclusive_group()
    twin.add_argument("--plain", action="store_true", help="the same network in plain PyTorch")
    twin.add_argument("--dense", action="store_true", help="the dense ReLU network of the same widths")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="STEPS", help="besides after each epoch")


def run(arguments: argparse.Namespace) -> int:
    known = networks(arguments.data_set)
    if arguments.name not in known:
        raise ValueError(f"wants one of {', '.join(known)} for --data-set {arguments.data_set}, got {arguments.name}")
    with distributed.process_group(arguments.device) as device:
        configuration = Configuration(
            known[arguments.name],
            arguments.seed,
            arguments.group_size,
            arguments.plain,
            arguments.dense,
            arguments.device,
        )
        return train(configuration, arguments, device)


def train(configuration: Configuration, arguments: argparse.Namespace, device: str) -> int:
    out = console() if distributed.rank() == 0 else Console(file=io.StringIO())
    epochs = configuration.network.epochs if arguments.epochs is None else arguments.epochs
    folder = arguments.out or default_folder(configuration)
    data = DATA_SETS[arguments.data_set](arguments.data, seed=arguments.seed, fetch=arguments.download, device=device)
    out.print(describe(configuration, data, epochs, folder))
    run = Run(configuration, data, folder, device=device, checkpoint_every=arguments.checkpoint_every, report=out.print)
    try:
        history = train_with_bar(run, epochs, out)
    except KeyboardInterrupt:
        out.print(f"interrupted after {run.epoch} epochs and {run.step} steps; the same command resumes")
        return 130
    if history:
        out.print(epochs_table(history))
        out.print(noise_table(history))
    if len(history) == configuration.network.epochs:
        out.print(f"result: {run.write_result()}")
    return 0


def default_folder(configuration: Configuration, runs: Path = RUNS) -> Path:
    network = configuration.network
    parts = [network.name] if network.data_set == "mnist" else [network.data_set, network.name]
    if configuration.kind != "sparse":
        parts.append(configuration.kind)
    if configuration.group_size > 1:
        parts.append(f"g{configuration.group_size}")
    return runs / "-".join([*parts, f"seed{configuration.seed}"])


def describe(configuration: Configuration, data, epochs: int, folder: Path) -> str:
    network = configuration.network
    what = {"sparse": "", "plain": " in plain PyTorch", "dense": " as a dense ReLU network"}[configuration.kind]
    ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    return (
        f"{network.name}{what}: filters {network.filters}, winners {network.k}; hidden {network.hidden}, winners "
        f"{network.winners}, weight density {network.density}, group size {configuration.group_size}\n"
        f"{epochs} epochs of {len(data)} samples from {data.folder}, batch {network.first} then {network.batch}, "
        f"seed {configuration.seed}, {configuration.device}{ranks}\n"
        f"log: {folder / LOG}"
    )


def train_with_bar(run: Run, epochs: int, console: Console) -> list[dict]:
    with progress_bar(console) as bar:
        task = bar.add_task(f"epoch {run.epoch + 1}", total=None)
        due = 0.0

        def progress(epoch: int, step: int, steps: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or step == steps:
                due = now + PROGRESS_SECONDS
                bar.update(task, description=f"epoch {epoch + 1}", completed=step, total=steps)

        return run.train(epochs, progress)


def epochs_table(history: list[dict]) -> Table:
    table = Table("epoch", "loss", "test score", "noise score", "training s", "testing s", title="epochs")
    for entry in history:
        table.add_row(
            str(entry["epoch"]),
            f"{entry['loss']:.4f}",
            f"{100 * entry['test_accuracy']:.2f}",
            f"{entry['noise_score']:,}",
            f"{entry['train_seconds']:.1f}",
            f"{entry['test_seconds']:.1f}",
        )
    return table


def noise_table(history: list[dict]) -> Table:
    """Accuracy at each noise level after the last epoch, and after the one that the paper's scores would be read off."""
    last, best = history[-1], best_epoch(history)
    table = Table("noise", f"last epoch ({last['epoch']})", f"best epoch ({best['epoch']})", title="scores")
    for eta in last["correct"]:
        table.add_row(eta, *(f"{100 * entry['correct'][eta] / entry['samples']:.2f}" for entry in (last, best)))
    table.add_row("sum", *(f"{entry['noise_score']:,}" for entry in (last, best)))
    return table
