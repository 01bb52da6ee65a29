"""What every case of the comparison is made of, and where its inputs come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checking import Checked
from sparsekern.paper.networks import Network, build, networks

# Different inputs that a timed function gets in turn, by batch size, so that no branch predictor learns one by heart.
POOL = {1: 16, 64: 4, 1024: 1}


@dataclass(frozen=True)
class Options:
    """What all cases have in common."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False


@dataclass
class Prepared:
    """A case that is ready to be checked and timed.

    Attributes:
        functions: what is timed, by role and name (see report.Result).
        check: raises checking.WrongResult, or says how large the error is and how many products there are.
        training: whether the functions run with gradients.
    """

    functions: dict[tuple[str, str], Callable[[], object]]
    check: Callable[[], Checked]
    training: bool


@dataclass(frozen=True)
class Case:
    """One line of the table, not built yet."""

    name: str
    work: str  # forward, forward + backward, inference, training step
    batch: int
    prepare: Callable[[Options], Prepared]

    def __str__(self) -> str:
        return f"{self.name}, {self.work}, B={self.batch}"


def in_turn(function: Callable, pool: list) -> Callable[[], object]:
    """A function of no arguments that calls the given one on the members of a pool in turn."""
    members: Iterator = itertools.cycle(pool)
    return lambda: function(next(members))


def network(name: str) -> Network:
    """The paper's network of a name such as ``"speech sparseCNN2"``."""
    data_set, name = name.split()
    return networks(data_set)[name]


def images(network: Network, batch: int, options: Options) -> Tensor:
    """Images with broad shapes and noise: real ones would have to be downloaded."""  # (B, 1, H, W)
    size = (network.input, network.input)
    shapes = F.interpolate(torch.randn(batch, 1, 7, 7), size, mode="bilinear")
    return (shapes + 0.3 * torch.randn(batch, 1, *size)).to(options.device, options.dtype)


def settled(network: Network, options: Options, **kind) -> nn.Sequential:
    """A network whose duty cycles have moved off zero, as after some training; the same weights for each kind."""
    torch.manual_seed(0)
    model = build(network, **kind).to(options.device, options.dtype, memory_format=torch.channels_last)
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(5):
            model(images(network, 64, options))
    return model


def layer_input(model: nn.Sequential, layer: str, x: Tensor) -> Tensor:
    """What a layer of a network in training gets when the network gets x."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]
