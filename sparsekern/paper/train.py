"""``train NAME``: trains one of the paper's networks and tests it at every noise level after each epoch."""

from __future__ import annotations

import argparse
import io
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from sparsekern.paper import checkpoint, distributed, options, results
from sparsekern.paper.datasets import DATA_SETS
from sparsekern.paper.networks import networks
from sparsekern.paper.progress import console, progress_bar
from sparsekern.paper.tables import Table
from sparsekern.paper.training import LOG, Configuration, Run, best_epoch

HELP = "train a network and test it under noise"
PROGRESS_SECONDS = 0.2  # between updates of the bar, which cost more than a step of a small batch
RUNS = Path("runs")
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = {name: ", ".join(networks(name)) for name in DATA_SETS}
    parser.add_argument("name", metavar="NAME", help="; ".join(f"{key}: {value}" for key, value in names.items()))
    parser.add_argument("--data-set", choices=DATA_SETS, default="mnist", help="default: mnist")
    parser.add_argument("--epochs", type=options.at_least(1), metavar="N", help="by default as many as in the paper")
    parser.add_argument("--seed", type=int, default=42, help="of weights, data order and noise (default: 42)")
    parser.add_argument(
        "--group-size", type=options.at_least(1), default=1, metavar="G", help="units that share a support (default: 1)"
    )
    twin = parser.add_mutually_exclusive_group()
    twin.add_argument("--plain", action="store_true", help="the same network in plain PyTorch")
    twin.add_argument("--dense", action="store_true", help="the dense ReLU network of the same widths")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result; log and checkpoints go to a folder beside it (default: runs/...)",
    )
    parser.add_argument(
        "--checkpoint-every", type=options.at_least(0), default=0, metavar="STEPS", help="besides after each epoch"
    )
    add_machine_arguments(parser)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that trains takes."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--download", action="store_true", help="get the files that are not there")
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=options.at_least(1), metavar="N", help="of the CPU (default: all)")


def run(arguments: argparse.Namespace) -> int:
    known = networks(arguments.data_set)
    if arguments.name not in known:
        raise ValueError(f"wants one of {', '.join(known)} for --data-set {arguments.data_set}, got {arguments.name}")
    if arguments.out and arguments.out.suffix != ".csv":
        raise ValueError(f"wants a name that ends in .csv for --out, got {arguments.out}")
    network = known[arguments.name]
    if arguments.epochs:
        network = replace(network, epochs=arguments.epochs)
    configuration = Configuration(
        network, arguments.seed, arguments.group_size, arguments.plain, arguments.dense, arguments.device
    )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with distributed.process_group(arguments.device) as device:
        out = console() if distributed.rank() == 0 else Console(file=io.StringIO())
        data = load_data(arguments.data_set, arguments, arguments.seed, device)
        path = arguments.out or default_path(configuration)
        options = {"device": device, "checkpoint_every": arguments.checkpoint_every}
        return 0 if train(configuration, data, path, out, **options) else INTERRUPTED


def load_data(data_set: str, arguments: argparse.Namespace, seed: int, device: str):
    """The data set; the first rank alone downloads what is not there."""
    if distributed.rank() > 0:
        distributed.barrier()
    fetch = arguments.download and distributed.rank() == 0
    data = DATA_SETS[data_set](arguments.data, seed=seed, fetch=fetch, device=device)
    if distributed.rank() == 0:
        distributed.barrier()
    return data


def train(configuration: Configuration, data, path: Path, out: Console, **options) -> results.Result | None:
    """What a run's file holds, after training it, or the rest of it, where there is no such file; None if interrupted."""
    out.print(describe(configuration, data, log_folder(path)))
    result = results.read_as(path, configuration.identity(data), report=out.print)
    if result is not None:
        return result
    with checkpoint.alone_in(log_folder(path)) if distributed.rank() == 0 else nullcontext():
        run = Run(configuration, data, log_folder(path), report=out.print, **options)
        try:
            history = train_with_bar(run, out)
        except KeyboardInterrupt:
            out.print(f"interrupted after {run.epoch} epochs and {run.step} steps; the same command resumes")
            return None
        epochs_table(history).print(out)
        noise_table(history).print(out)
        result = run.write_result(path)
        out.print(f"result: {path}")
        return result


def log_folder(path: Path) -> Path:
    """Where a run's log and checkpoints are, beside its result."""
    return path.with_suffix("")


def default_path(configuration: Configuration, runs: Path = RUNS) -> Path:
    return runs / configuration.network.data_set / f"{configuration.label}-seed{configuration.seed}.csv"


def command(configuration: Configuration, path: Path) -> list[str]:
    """The arguments that make a run's file."""
    return [
        *("train", configuration.network.name, "--data-set", configuration.network.data_set),
        *("--seed", str(configuration.seed), "--group-size", str(configuration.group_size)),
        *("--device", configuration.device, "--out", str(path)),
    ]


def describe(configuration: Configuration, data, folder: Path) -> str:
    network = configuration.network
    what = {"sparse": "", "plain": " in plain PyTorch", "dense": " as a dense ReLU network"}[configuration.kind]
    ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    return (
        f"{network.name}{what}: filters {network.filters}, winners {network.k}; hidden {network.hidden}, winners "
        f"{network.winners}, weight density {network.density}, group size {configuration.group_size}\n"
        f"{network.epochs} epochs of {len(data)} samples from {data.folder}, batch {network.first} then {network.batch}, "
        f"seed {configuration.seed}, {configuration.device}{ranks}\n"
        f"log: {folder / LOG}"
    )


def train_with_bar(run: Run, console: Console) -> list[dict]:
    with progress_bar(console) as bar:
        task = bar.add_task(f"epoch {run.epoch + 1}", total=None)
        due = 0.0

        def progress(what: str, done: int, of: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or done == of:
                due = now + PROGRESS_SECONDS
                bar.update(task, description=what, completed=done, total=of)

        return run.train(run.network.epochs, progress)


def epochs_table(history: list[dict]) -> Table:
    rows = [
        [
            str(entry["epoch"]),
            f"{entry['loss']:.4f}",
            f"{100 * entry['test_accuracy']:.2f}",
            f"{entry['noise_score']:,}",
            f"{entry['train_seconds']:.1f}",
            f"{entry['test_seconds']:.1f}",
        ]
        for entry in history
    ]
    return Table("Epochs", ["epoch", "loss", "test score", "noise score", "training s", "testing s"], rows)


def noise_table(history: list[dict]) -> Table:
    """Accuracy at each noise level after the last epoch, and after the one that the paper's scores would be read off."""
    last, best = history[-1], best_epoch(history)
    rows = [
        [eta, *(f"{100 * entry['correct'][eta] / entry['samples']:.2f}" for entry in (last, best))]
        for eta in last["correct"]
    ]
    rows.append(["sum", *(f"{entry['noise_score']:,}" for entry in (last, best))])
    columns = ["noise", f"last epoch ({last['epoch']})", f"best epoch ({best['epoch']})"]
    return Table("Correct, %", columns, rows)
