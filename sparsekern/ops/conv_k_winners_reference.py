"""Convolution, pooling and k-winners in one op, in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import k_winners_reference as pooled


def conv_max_pool_k_winners2d(
    x: Tensor,  # (B, 1, H, W)
    weight: Tensor,  # (C, 1, KH, KW)
    bias: Tensor | None,  # (C,)
    mean: Tensor | None,  # (C,)
    scale: Tensor | None,  # (C,), above 0; with eps the variance
    k: int,
    duty_cycle: Tensor | None,  # (C,)
    boost_strength: Tensor | None,  # () float32
    want_offsets: bool = True,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = torch.nn.functional.conv2d(x, weight, bias)
    z = z.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if mean is None:
        y, winners, offsets, counts = pooled.max_pool_k_winners2d(z, k, duty_cycle, boost_strength, 2)
    else:
        args = (z, mean, scale, k, duty_cycle, boost_strength, 2, False, eps)
        y, winners, offsets, counts = pooled.norm_max_pool_k_winners2d(*args)
    return y, winners, offsets if want_offsets else offsets.new_empty((len(x), 0)), counts


def conv_max_pool_k_winners2d_grad_weight(
    grad_y: Tensor,  # (B, C, P, Q)
    winners: Tensor,  # (B, 2 * ceil(C * P * Q / 16)) uint8
    offsets: Tensor,  # (B, k) int32
    x: Tensor,  # (B, 1, H, W)
    kernel_size: list[int],
) -> Tensor:
    C = grad_y.shape[1]
    rows = pooled.map_rows(grad_y, True).double()
    order = pooled.unpack_winners(winners, rows.shape[1]).to(torch.uint8)
    order = order.argsort(dim=1, descending=True, stable=True)
    grads = rows.gather(1, order[:, : offsets.shape[1]])  # (B, k)
    patches = torch.nn.functional.unfold(x.double(), kernel_size)  # (B, KH * KW, places)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1).transpose(1, 2)
    offsets = offsets.long()
    places = (offsets // C).unsqueeze(2).expand(-1, -1, patches.shape[2])
    products = grads.unsqueeze(2) * patches.gather(1, places)
    sums = rows.new_zeros(C, patches.shape[2])
    return sums.index_add(0, (offsets % C).flatten(), products.flatten(0, 1))


def patch_moments(
    x: Tensor,  # (B, 1, H, W)
    kernel_size: list[int],
) -> Tensor:
    patches = torch.nn.functional.unfold(x.double(), kernel_size).transpose(0, 1).flatten(1)
    patches = torch.cat([patches, torch.ones_like(patches[:1])])
    return patches @ patches.T
