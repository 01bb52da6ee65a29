"""The gradient of a bias in plain PyTorch: the oracle of the tests, and the body where no kernel serves."""

from __future__ import annotations

from torch import Tensor


def grad_bias(grad_y: Tensor) -> Tensor:  # (B, O) or (B, O, H, W)
    return grad_y.sum((0, *range(2, grad_y.dim())))
