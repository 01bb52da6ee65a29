"""What the sparse layers share when parameters go from one layer to another."""

from __future__ import annotations

from torch import Tensor, nn


def freeze_as(layer: nn.Module, new: nn.Module) -> nn.Module:
    """new, of whose weight and bias those want no gradient that want none in layer."""
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)  # not what a parametrisation computes
        if parameter is not None:
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new


def whole(t: Tensor) -> Tensor:
    """t, gathered from all ranks where FSDP has sharded it."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
