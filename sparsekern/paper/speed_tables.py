"""What ``speed`` prints: products saved and time saved, and the times themselves."""

from __future__ import annotations

import math
from pathlib import Path

from sparsekern.paper import results, runs
from sparsekern.paper.networks import Network, networks
from sparsekern.paper.tables import Table

PAPER = {("sparseCNN2", "conv2"): "10.5", ("sparseCNN2", "hidden"): "20", ("superSparseCNN2", "hidden"): "35"}
TITLES = {"mnist": "MNIST", "speech": "speech"}
ARITHMETIC = (
    "The paper's 10.5x (12544 / 1200) and 20x (1600 x 1000 / (200 x 0.4 x 1000)) are those of training's winners. Its 35x "
    "sets superSparseCNN2's hidden layer against the dense network's of 1000 units, and is reached with the 300 winners of "
    "inference, 1600 x 1000 / (300 x 0.1 x 1500) = 35.6x; with training's 200 it is 53x, and against a dense layer of its "
    "own 1500 units 80x."
)


def products_path(folder: Path) -> Path:
    return folder / "products.csv"


def times_path(folder: Path) -> Path:
    return folder / "speed.csv"


def show(folder: Path) -> list[Table]:
    products, times = (results.read(path(folder)) for path in (products_path, times_path))
    sets = dict.fromkeys(row["data_set"] for row in products.rows)
    tables = [savings_table(data_set, products, times, folder) for data_set in sets]
    return tables + [times_table(data_set, times, times_path(folder)) for data_set in sets]


def savings_table(data_set: str, products: results.Result, times: results.Result, folder: Path) -> Table:
    """A row a layer, and one of all layers with the measured speed-ups."""
    batch = products.configuration["batch"]
    fast = f"G={times.configuration['group_size']}"
    measured = {
        (row["network"], row["use"]): [speed_up(row, kind, "dense") for kind in ("sparse", "fast")]
        for row in times.rows
        if row["data_set"] == data_set and int(row["batch"]) == batch
    }
    cells = []
    of_set = [row for row in products.rows if row["data_set"] == data_set]
    for name in dict.fromkeys(row["network"] for row in of_set):
        layers = [row for row in of_set if row["network"] == name]
        for row in layers:
            paper = PAPER.get((name, row["layer"])) if data_set == "speech" else None
            cells.append(
                [f"{name}: {row['layer']}", *_counts([row]), f"{paper}x" if paper else "-", *["-"] * 4, row["weights"]]
            )
        faster = [measured[name, use] for use in ("training step", "inference")]
        cells.append([f"{name}: all layers", *_counts(layers), "-", *faster[0], *faster[1], layers[0]["weights"]])
    columns = ["layer", "dense", "non-zero, training", "non-zero, inference", "saved, training", "saved, inference"]
    columns += ["saved, in the paper"]
    columns += [f"{use} faster, {layout}" for use in ("training step", "inference") for layout in ("G=1", fast)]
    notes = [
        f"Products a sample, counted on the real activations of {batch} test samples; in inference 1.5 times as many "
        "units win as in training. A winner at a map's border meets fewer of the next convolution's weights, so that what "
        "is saved there depends on where the winners are: more than n / k for weights that have hardly been trained. "
        f"Faster: than the dense ReLU network of the same widths, batch {batch}, in the times below, which are taken with "
        "fresh weights; the products are those of trained ones.",
        ARITHMETIC if data_set == "speech" else "",
        f"From {products_path(folder)} and {times_path(folder)}.",
    ]
    title = f"Section 4.3, {TITLES[data_set]}: products saved, and time"
    return Table(title, [*columns, "weights after"], cells, [note for note in notes if note])


def _counts(layers: list[dict]) -> list[str]:
    dense, training, inference = (
        sum(float(row[name]) for row in layers) for name in ("dense", "training", "inference")
    )
    return [
        *(f"{products:,.0f}" for products in (dense, training, inference)),
        *(f"{dense / products:.1f}x" for products in (training, inference)),
    ]


def times_table(data_set: str, result: results.Result, path: Path) -> Table:
    kinds = ("sparse", "fast", "plain", "dense")
    of_set = [row for row in result.rows if row["data_set"] == data_set]
    cells = [
        [
            f"{row['network']}: {row['use']}, batch {row['batch']}",
            *(time(row, kind) for kind in kinds),
            *(speed_up(row, kind, other) for kind in ("sparse", "fast") for other in ("plain", "dense")),
        ]
        for row in of_set
    ]
    fast = f"G={result.configuration['group_size']}"
    columns = ["network and use", "G=1, ms", f"{fast}, ms", "plain PyTorch, ms", "dense ReLU, ms"]
    columns += [f"{layout} over {other}" for layout in ("G=1", fast) for other in ("plain", "dense")]
    where = result.environment
    made = f", {where['date']}, commit {where['commit'] or 'unknown'}" if "date" in where else ""
    spread = (
        "Median ± half the distance of the quartiles; a ratio's is that of its two times together. "
        if any(row.get("spread dense") for row in of_set)
        else "Median. "
    )
    same = [name for name in dict.fromkeys(row["network"] for row in of_set) if is_dense(networks(data_set).get(name))]
    note = (
        f"{spread}Networks with fresh weights; {where['device']}, {runs.how_many(where['threads'], 'thread')}, torch "
        f"{where['torch']}{made}. From {path}."
    )
    noise = (
        f"{' and '.join(same)}: dense, so that all columns time the same layers; their ratios show the timing's noise."
    )
    title = f"Section 4.3, {TITLES[data_set]}: times"
    return Table(title, columns, cells, [note, noise] if same else [note])


def is_dense(network: Network | None) -> bool:
    """Whether :func:`sparsekern.paper.networks.build` makes the same layers of it, plain, dense or neither."""
    if network is None:
        return False
    units = [filters * side * side for filters, side in zip(network.filters, network.map_sizes(), strict=True)]
    return network.density == 1 and network.winners == network.hidden and network.k == units


def time(row: dict, kind: str) -> str:
    if not row[kind]:
        return "-"
    spread = row.get(f"spread {kind}")
    return f"{float(row[kind]):.2f}" + (f" ± {float(spread):.2f}" if spread else "")


def speed_up(row: dict, kind: str, other: str) -> str:
    """How many times as fast one kind is as another."""
    if not row[kind]:
        return "-"
    ratio = float(row[other]) / float(row[kind])
    spreads = [row.get(f"spread {name}") for name in (kind, other)]
    if not all(spreads):
        return f"{ratio:.2f}x"
    relative = math.hypot(*(float(s) / float(row[name]) for s, name in zip(spreads, (kind, other), strict=True)))
    return f"{ratio:.2f} ± {ratio * relative:.2f}x"
