"""``speed``: products, dense and non-zero, layer by layer, and what the savings come to in time (section 4.3)."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.paper import checkpoint, options, results, runs
from sparsekern.paper.networks import Network, build, networks, place
from sparsekern.paper.plain import rezero_
from sparsekern.paper.progress import console, track
from sparsekern.paper.scores import FAST_LAYOUT
from sparsekern.paper.speed_tables import products_path, show, times_path
from sparsekern.paper.train import RUNS, add_machine_arguments, default_path, load_data, log_folder
from sparsekern.paper.training import Configuration

HELP = "products layer by layer on real activations, and measured speed-ups"
SETS = ("mnist", "speech")
BATCH = 64
ROUNDS = {"training step": 9, "inference": 25}  # timed calls of each network, in turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds",
        type=options.seeds,
        default=options.seeds("42-51"),
        metavar="A-B",
        help="the first of these with a finished run gives the weights (default: 42-51)",
    )
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="of the runs (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=options.at_least(1),
        default=200,
        metavar="N",
        help="of training where no run is finished (default: 200)",
    )
    parser.add_argument(
        "--group-size", type=options.at_least(1), default=FAST_LAYOUT, metavar="G", help="beside 1 (default: 16)"
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")
    add_machine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    out = console()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    configuration = {name: getattr(arguments, name) for name in ("steps", "seeds", "group_size", "device")}
    load = cache(lambda data_set: load_data(data_set, arguments, arguments.seeds[0], arguments.device))
    for path, make, outdated in (
        (products_path(arguments.out), count, partial(could_be_trained, arguments=arguments)),
        (times_path(arguments.out), measure, lambda rows: False),
    ):
        rows = partial(over_networks, make, load, arguments, out)
        options = {"device": arguments.device, "report": out.print, "outdated": outdated}
        results.made_once(path, {**configuration, "batch": BATCH}, rows, **options)
    for table in show(arguments.out):
        table.print(out)
    return 0


def over_networks(make: Callable, load: Callable, arguments: argparse.Namespace, out: Console) -> list[dict]:
    """What ``make`` has to say of every network."""
    return [
        {"data_set": data_set, "network": name, **row}
        for data_set in SETS
        for name in track(networks(data_set), f"{make.__name__} {data_set} networks", out)
        for row in make(networks(data_set)[name], load(data_set), arguments, out.print)
    ]


def could_be_trained(rows: list[dict], arguments: argparse.Namespace) -> bool:
    """Whether products were counted after a network's first steps, of which there is a finished run by now."""
    wanting = {(row["data_set"], row["network"]) for row in rows if "steps" in row["weights"]}
    paths = [
        default_path(Configuration(networks(data_set)[name], seed, device=arguments.device), arguments.runs)
        for data_set, name in wanting
        for seed in arguments.seeds
    ]
    return any(path.exists() and (log_folder(path) / checkpoint.NAME).exists() for path in paths)


def trained(network: Network, data, arguments: argparse.Namespace, report) -> tuple[nn.Sequential, str]:
    """A network whose activations are real ones, and where its weights come from: a finished run, or its first steps."""
    for seed in arguments.seeds:
        model = runs.finished_model(Configuration(network, seed, device=arguments.device), data, arguments.runs, report)
        if model is not None:
            return place(model, arguments.device), f"{network.epochs} epochs, seed {seed}"
    torch.manual_seed(arguments.seeds[0])
    model, step = prepared(network, arguments.device)
    generator = torch.Generator().manual_seed(arguments.seeds[0])
    for _ in range(arguments.steps):
        indices = torch.randint(len(data), (BATCH,), generator=generator).to(arguments.device)
        step(*data.batch(indices, generator=generator))
    return model, f"{arguments.steps} steps, seed {arguments.seeds[0]}"


def prepared(network: Network, device: str, **options) -> tuple[nn.Sequential, Callable]:
    """A fresh network, as ``build`` makes it, and its training step."""
    model = place(build(network, **options), device)
    optimizer = torch.optim.SGD(
        model.parameters(), network.lr, network.momentum, weight_decay=network.weight_decay, fused=True
    )
    if options.get("plain"):
        optimizer.register_step_post_hook(lambda *_: rezero_(model))

    def step(x: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.nll_loss(model(x), labels).backward()
        optimizer.step()

    return model, step


def count(network: Network, data, arguments: argparse.Namespace, report) -> list[dict]:
    """A row a layer that multiplies: products a sample, dense and non-zero, with training's winners and inference's."""
    model, weights = trained(network, data, arguments, report)
    x, _ = next(iter(data.test_batches(0.0, BATCH)))
    k_winners = [layer for layer in model.modules() if isinstance(layer, (sk.KWinners, sk.KWinners2d))]
    counted = []
    for factor in (1.0, network.k_inference_factor):
        for layer in k_winners:
            layer.k_inference_factor = factor
        counted.append(sk.profile(model, x, repeats=1, show=False).layers)
    return [
        {
            "layer": training.name.replace("winners", "conv"),  # k-winners multiply where they hold the convolution
            "weights": weights,
            "dense": training.dense_products // len(x),
            "training": training.products / len(x),
            "inference": inference.products / len(x),
        }
        for training, inference in zip(*counted, strict=True)
        if training.dense_products
    ]


def measure(network: Network, data, arguments: argparse.Namespace, report) -> list[dict]:
    """A row a use: milliseconds of the network, in the fast layout too, and of its plain PyTorch and dense ReLU twins."""
    x, labels = next(iter(data.test_batches(0.0, BATCH)))
    torch.manual_seed(arguments.seeds[0])
    kinds = {
        "sparse": {},
        "fast": {"group_size": arguments.group_size},
        "plain": {"plain": True},
        "dense": {"dense": True},
    }
    models = {kind: prepared(network, arguments.device, **options) for kind, options in kinds.items()}
    if network.density == 1:
        del models["fast"]  # the same network
    calls = {kind: partial(step, x, labels) for kind, (_, step) in models.items()}
    without = {"fast": "", "spread fast": ""}
    rows = [{"use": "training step", "batch": BATCH, **without, **timed(calls, "training step")}]
    for size in (1, BATCH):
        calls = {kind: partial(infer, model.eval(), x[:size]) for kind, (model, _) in models.items()}
        rows.append({"use": "inference", "batch": size, **without, **timed(calls, "inference")})
    return rows


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def timed(calls: dict[str, Callable], use: str) -> dict[str, float]:
    """The median time of each call in milliseconds and its spread, half the distance of the quartiles.

    They are taken in turn, so that what else the machine does meets all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS[use] + 1):  # the first warms up
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    found = {}
    for name, of_call in times.items():
        low, median, high = statistics.quantiles(of_call[1:], method="inclusive")
        found |= {name: round(median, 4), f"spread {name}": round((high - low) / 2, 4)}
    return found
