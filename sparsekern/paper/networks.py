"""The paper's networks: their parameters (networks.toml) and the one definition of their architecture."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

import sparsekern as sk
from sparsekern.paper.plain import PlainKWinners, PlainKWinners2d, plain_

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KERNEL, POOL, CLASSES = 5, 2, 10


@dataclass(frozen=True)
class Network:
    """One row of networks.toml, which explains the columns, with what is common to its data set."""

    data_set: str
    name: str
    filters: list[int]
    k: list[int]
    hidden: int
    winners: int
    density: float
    boost: float
    momentum: float
    first: int
    batch: int
    epochs: int
    lr: float
    input: int
    lr_factor: float
    boost_factor: float
    k_inference_factor: float
    duty_cycle_period: int
    batch_norm: bool
    dropout: float
    weight_decay: float

    def map_sizes(self) -> list[int]:
        """The side of each convolution's map after pooling."""
        sizes, side = [], self.input
        for _ in self.filters:
            side = (side - KERNEL + 1) // POOL
            sizes.append(side)
        return sizes


def networks(data_set: str) -> dict[str, Network]:
    """The networks of a data set (``mnist``, ``speech`` or ``gaussian``) by name, in the order of the paper's tables."""
    table = _tables()[data_set]
    return {
        name: Network(data_set, name, **dict(zip(table["columns"], row, strict=True)), **table["common"])
        for name, row in table["networks"].items()
    }


@dataclass(frozen=True)
class Published:
    """A network's row of Table 1 or 2."""

    test: float
    test_std: float
    noise: float
    noise_std: float
    samples: int  # that a noise level was tested on


def published(data_set: str) -> dict[str, Published]:
    """The paper's scores by network."""
    table = _tables()[data_set].get("published", {"samples": 0, "scores": {}})
    return {name: Published(*scores, table["samples"]) for name, scores in table["scores"].items()}


def discussion() -> dict[str, tuple[float, float]]:
    """The lowest and the highest accuracy in % that the discussion has of each network at its strongest noise."""
    return {name: (min(found), max(found)) for name, found in _tables()["gaussian"]["discussion"].items()}


@cache
def _tables() -> dict:
    with open(Path(__file__).with_name("networks.toml"), "rb") as file:
        return tomllib.load(file)


def build(network: Network, *, group_size: int = 1, plain: bool = False, dense: bool = False) -> nn.Sequential:
    """A network with fresh weights from torch's generator; its output is the log-probability of each class.

    Args:
        network: which one.
        group_size: of the hidden layer's weights (:class:`sparsekern.SparseLinear`).
        plain: the same network, weights and masks in plain PyTorch: ``topk`` and masked dense weights.
        dense: the dense ReLU network of the same widths.
    """
    if plain and dense:
        raise ValueError("build: wants at most one of plain and dense, got both")
    k_winners = PlainKWinners if plain else sk.KWinners
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    behind_k_winners = False  # whether the next layer's input comes out of k-winners, whose backward drops the losers
    for i, (filters, k, side) in enumerate(zip(network.filters, network.k, network.map_sizes(), strict=True), 1):
        conv = (
            sk.SparseConv2d(channels, filters, KERNEL, sparse_input_grad=True)
            if behind_k_winners
            else nn.Conv2d(channels, filters, KERNEL)
        )
        norm = nn.BatchNorm2d(filters, affine=False) if network.batch_norm else None
        behind_k_winners = not dense and k < filters * side * side
        if behind_k_winners and not plain:
            if i > 1:
                layers[f"conv{i}"] = conv
            last = i == len(network.filters)  # and flattened
            layers[f"winners{i}"] = sk.KWinners2d(
                filters,
                k,
                conv=conv if i == 1 else None,
                norm=norm,
                max_pool=POOL,
                memory_format=torch.contiguous_format if last else None,
                **_boosting(network),
            )
        else:
            layers[f"conv{i}"] = conv
            if norm is not None:
                layers[f"norm{i}"] = norm
            layers[f"pool{i}"] = nn.MaxPool2d(POOL)
            layers[f"winners{i}"] = PlainKWinners2d(filters, k, **_boosting(network)) if behind_k_winners else nn.ReLU()
        channels = filters
    layers["flatten"] = nn.Flatten()
    inputs = channels * side * side
    layers["hidden"] = (
        nn.Linear(inputs, network.hidden)
        if dense or network.density == 1
        else sk.SparseLinear(
            inputs,
            network.hidden,
            density=network.density,
            group_size=group_size,
            sparse_input_grad=behind_k_winners,
        )
    )
    if network.batch_norm:
        layers["norm"] = nn.BatchNorm1d(network.hidden, affine=False)
    chosen = not dense and network.winners < network.hidden
    layers["winners"] = k_winners(network.hidden, network.winners, **_boosting(network)) if chosen else nn.ReLU()
    if network.dropout:
        layers["dropout"] = nn.Dropout(network.dropout)
    layers["output"] = nn.Linear(network.hidden, CLASSES)
    layers["log_softmax"] = nn.LogSoftmax(dim=1)
    model = nn.Sequential(layers)
    return plain_(model) if plain else model


def place(model: nn.Sequential, device: str) -> nn.Sequential:
    """Moves a network to a device, in place; dense convolutions' weights lie channels-last, as their activations do.

    Those of sparse convolutions stay contiguous: PyTorch's fused SGD copies the gradient of any other weight, which takes
    longer than the step itself.
    """
    model.to(device)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return model


def _boosting(network: Network) -> dict:
    return {
        "k_inference_factor": network.k_inference_factor,
        "boost_strength": network.boost,
        "boost_strength_factor": network.boost_factor,
        "duty_cycle_period": network.duty_cycle_period,
    }
