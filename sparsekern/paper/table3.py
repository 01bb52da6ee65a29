"""``table3``: the parameters of the networks, as ``networks.toml`` holds them."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsekern.paper.networks import networks
from sparsekern.paper.progress import console
from sparsekern.paper.tables import Table

HELP = "the networks' parameters"
PARAMETERS = [
    "filters", "k", "hidden", "winners", "density", "boost", "boost_factor", "momentum", "weight_decay", "dropout",
    "first", "batch", "epochs", "lr", "lr_factor",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    for table in show():
        table.print(console())
    return 0


def show(folder: Path | None = None) -> list[Table]:
    tables = []
    for data_set, title in (("mnist", "Table 3: MNIST networks"), ("speech", "Table 3: speech networks")):
        known = networks(data_set)
        rows = [[name, *(_cell(getattr(network, name)) for network in known.values())] for name in PARAMETERS]
        tables.append(Table(title, ["", *known], rows))
    tables[-1].notes.append("From sparsekern/paper/networks.toml, which explains the names.")
    return tables


def _cell(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
