"""The sparse-input convolution in plain PyTorch: the oracle of the tests, and the body where no kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_conv2d(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    bias: Tensor | None,  # (O,)
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding)


def sparse_conv2d_grad_input(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    stride: list[int],
    padding: list[int],
    at_nonzeros: bool,
) -> Tensor:
    grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad_y, stride, padding)
    return torch.where(x != 0, grad_x, torch.zeros((), dtype=x.dtype, device=x.device)) if at_nonzeros else grad_x


def sparse_conv2d_grad_weight(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return torch.nn.grad.conv2d_weight(x, [grad_y.shape[1], x.shape[1], *kernel_size], grad_y, stride, padding)
