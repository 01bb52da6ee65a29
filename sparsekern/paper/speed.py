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
from sparsekern.paper import options, results, runs
from sparsekern.paper.networks import Network, build, networks, place
from sparsekern.paper.plain import rezero_
from sparsekern.paper.progress import console, track
from sparsekern.paper.scores import FAST_LAYOUT
from sparsekern.paper.tables import Table
from sparsekern.paper.train import RUNS, add_machine_arguments, load_data
from sparsekern.paper.training import Configuration

HELP = "products layer by layer on real activations, and measured speed-ups"
SETS = ("mnist", "speech")
BATCH = 64
PAPER = {("sparseCNN2", "conv2"): "10.5", ("sparseCNN2", "hidden"): "20", ("superSparseCNN2", "hidden"): "35"}
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
    for path, make in ((products_path(arguments.out), count), (times_path(arguments.out), measure)):
        rows = partial(over_networks, make, load, arguments, out)
        results.made_once(path, {**configuration, "batch": BATCH}, rows, device=arguments.device, report=out.print)
    for table in show(arguments.out):
        table.print(out)
    return 0


def products_path(folder: Path) -> Path:
    return folder / "products.csv"


def times_path(folder: Path) -> Path:
    return folder / "speed.csv"


def over_networks(make: Callable, load: Callable, arguments: argparse.Namespace, out: Console) -> list[dict]:
    """What ``make`` has to say of every network."""
    return [
        {"data_set": data_set, "network": name, **row}
        for data_set in SETS
        for name in track(networks(data_set), f"{make.__name__} {data_set} networks", out)
        for row in make(networks(data_set)[name], load(data_set), arguments, out.print)
    ]


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
    rows = [{"use": "training step", "batch": BATCH, "fast": "", **medians(calls, "training step")}]
    for size in (1, BATCH):
        calls = {kind: partial(infer, model.eval(), x[:size]) for kind, (model, _) in models.items()}
        rows.append({"use": "inference", "batch": size, "fast": "", **medians(calls, "inference")})
    return rows


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def medians(calls: dict[str, Callable], use: str) -> dict[str, float]:
    """The median time of each call in milliseconds, taken in turn, so that what else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS[use] + 1):  # the first warms up
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(ts[1:]), 4) for name, ts in times.items()}


def show(folder: Path) -> list[Table]:
    products, times = (results.read(path(folder)) for path in (products_path, times_path))
    return [products_table(products.rows, products_path(folder)), times_table(times, times_path(folder))]


def products_table(rows: list[dict], path: Path) -> Table:
    cells = []
    for row in rows:
        dense, training, inference = (float(row[name]) for name in ("dense", "training", "inference"))
        paper = PAPER.get((row["network"], row["layer"])) if row["data_set"] == "speech" else None
        cells.append(
            [
                f"{row['data_set']} {row['network']}: {row['layer']}",
                *(f"{products:,.0f}" for products in (dense, training, inference)),
                *(f"{dense / products:.1f}x" for products in (training, inference)),
                f"{paper}x" if paper else "-",
                row["weights"],
            ]
        )
    columns = [
        "layer",
        "dense",
        "non-zero, training",
        "non-zero, inference",
        "saved, training",
        "saved, inference",
        "paper",
        "weights after",
    ]
    notes = [
        f"Products a sample, counted on the real activations of {BATCH} test samples; in inference 1.5 times as many "
        "units win as in training. A winner at a map's border meets fewer of the next convolution's weights, so that what "
        "is saved there depends on where the winners are: more than n / k for weights that have hardly been trained. "
        "The paper's 10.5x (12544 / 1200) and 20x (1600 x 1000 / (200 x 0.4 x 1000)) are those of training's winners. "
        "Its 35x sets superSparseCNN2's hidden layer against the dense network's of 1000 units, and is reached with the "
        "300 winners of inference, 1600 x 1000 / (300 x 0.1 x 1500) = 35.6x; with training's 200 it is 53x, and against a "
        "dense layer of its own 1500 units 80x.",
        f"From {path}.",
    ]
    return Table("Section 4.3: products", columns, cells, notes)


def times_table(result: results.Result, path: Path) -> Table:
    cells = []
    for row in result.rows:
        times = {kind: float(row[kind]) for kind in ("sparse", "fast", "plain", "dense") if row[kind]}
        cells.append(
            [
                f"{row['data_set']} {row['network']}: {row['use']}, batch {row['batch']}",
                *(f"{times[kind]:.2f}" if kind in times else "-" for kind in ("sparse", "fast", "plain", "dense")),
                *(_ratio(times, other, kind) for kind in ("sparse", "fast") for other in ("plain", "dense")),
            ]
        )
    fast = f"G = {result.configuration['group_size']}"
    columns = ["network and use", "G = 1, ms", f"{fast}, ms", "plain PyTorch, ms", "dense ReLU, ms"]
    columns += [f"{layout} against {other}" for layout in ("G = 1", fast) for other in ("plain", "dense")]
    where = result.environment
    note = f"Median times on {where['device']}, {where['threads']} threads, torch {where['torch']}. From {path}."
    return Table("Section 4.3: measured", columns, cells, [note])


def _ratio(times: dict[str, float], other: str, kind: str) -> str:
    return f"{times[other] / times[kind]:.2f}x" if kind in times else "-"
