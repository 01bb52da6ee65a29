"""``train NAME``: trains one of the paper's networks and tests it at every noise level after each epoch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparsekern.paper.mnist import Mnist
from sparsekern.paper.networks import networks
from sparsekern.paper.training import LOG, Configuration, Run

HELP = "train a network and test it under noise"
PROGRESS_SECONDS = 0.2  # between updates of the bar, which cost more than a step of a small batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=networks("mnist"), metavar="NAME", help=", ".join(networks("mnist")))
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the MNIST files")
    parser.add_argument("--download", action="store_true", help="get the files that are not there")
    parser.add_argument("--epochs", type=int, metavar="N", help="by default as many as in the paper")
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints and log; by default runs/NAME-...")
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
    console = Console(highlight=False, soft_wrap=True)
    configuration = Configuration(
        networks("mnist")[arguments.name],
        arguments.seed,
        arguments.group_size,
        arguments.plain,
        arguments.dense,
        arguments.device,
    )
    epochs = configuration.network.epochs if arguments.epochs is None else arguments.epochs
    folder = arguments.out or default_folder(configuration)
    data = Mnist(arguments.data, seed=arguments.seed, fetch=arguments.download, device=arguments.device)
    console.print(describe(configuration, data, epochs, folder))
    run = Run(configuration, data, folder, checkpoint_every=arguments.checkpoint_every, report=console.print)
    try:
        history = train_with_bar(run, epochs, console)
    except KeyboardInterrupt:
        console.print(f"interrupted after {run.epoch} epochs and {run.step} steps; the same command resumes")
        return 130
    if history:
        console.print(epochs_table(history))
        console.print(noise_table(history))
    return 0


def default_folder(configuration: Configuration) -> Path:
    parts = [configuration.network.name]
    if configuration.kind != "sparse":
        parts.append(configuration.kind)
    if configuration.group_size > 1:
        parts.append(f"g{configuration.group_size}")
    return Path("runs") / "-".join([*parts, f"seed{configuration.seed}"])


def describe(configuration: Configuration, data, epochs: int, folder: Path) -> str:
    network = configuration.network
    what = {"sparse": "", "plain": " in plain PyTorch", "dense": " as a dense ReLU network"}[configuration.kind]
    return (
        f"{network.name}{what}: filters {network.filters}, winners {network.k}; hidden {network.hidden}, winners "
        f"{network.winners}, weight density {network.density}, group size {configuration.group_size}\n"
        f"{epochs} epochs of {len(data)} images from {data.folder}, batch {network.first} then {network.batch}, "
        f"seed {configuration.seed}, {configuration.device}\n"
        f"log: {folder / LOG}"
    )


def train_with_bar(run: Run, epochs: int, console: Console) -> list[dict]:
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", total=None, epoch=run.epoch + 1)
        due = 0.0

        def progress(epoch: int, step: int, steps: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or step == steps:
                due = now + PROGRESS_SECONDS
                bar.update(task, completed=step, total=steps, epoch=epoch + 1)

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
    last, best = history[-1], max(history, key=lambda entry: entry["test_accuracy"])
    table = Table("noise", f"last epoch ({last['epoch']})", f"best test score (epoch {best['epoch']})", title="scores")
    for eta in last["correct"]:
        table.add_row(eta, *(f"{100 * entry['correct'][eta] / entry['samples']:.2f}" for entry in (last, best)))
    table.add_row("sum", *(f"{entry['noise_score']:,}" for entry in (last, best)))
    return table
