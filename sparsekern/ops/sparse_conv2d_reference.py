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


def _wide(t: Tensor) -> Tensor:
    """float16 on CPU as float32: PyTorch would sum a convolution's gradients in float16 there."""
    return t.float() if t.dtype == torch.float16 and t.device.type == "cpu" else t


def sparse_conv2d_grad_input(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C, KH, KW)
    stride: list[int],
    padding: list[int],
    at_nonzeros: bool,
) -> Tensor:
    grad_x = torch.nn.grad.conv2d_input(x.shape, _wide(weight), _wide(grad_y), stride, padding).to(x.dtype)
    return torch.where(x != 0, grad_x, torch.zeros((), dtype=x.dtype, device=x.device)) if at_nonzeros else grad_x


def sparse_conv2d_grad_weight(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    shape = [grad_y.shape[1], x.shape[1], *kernel_size]
    return torch.nn.grad.conv2d_weight(_wide(x), shape, _wide(grad_y), stride, padding).to(x.dtype)
