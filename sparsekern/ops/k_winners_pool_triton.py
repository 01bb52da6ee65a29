"""k-winners of a max-pooled map: pooled into rows first, and the winners' places handed on for the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops._triton import cdiv, next_power_of_2, on_device, widen
from sparsekern.ops.k_winners_triton import MAX_N, k_winners


@triton.jit
def _max_pool_kernel(
    x_ptr,  # (B, C, H, W) or (B, H, W, C)
    pooled_ptr,  # (B, n): n = C P Q, in x's order
    taken_ptr,  # (B, n) int32: where in its map each maximum was taken from
    n,
    C,
    H,
    W,
    P,
    Q,
    POOL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    u = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    valid = u < n
    x_ptr += row * C * H * W
    if CHANNELS_LAST:
        step = C
        first = (u // C // Q * POOL * W + u // C % Q * POOL) * C + u % C
    else:
        step = 1
        first = u // (P * Q) * (H * W) + u // Q % P * POOL * W + u % Q * POOL
    best = tl.load(x_ptr + first, mask=valid, other=0.0)
    taken = first
    for i in tl.static_range(1, POOL * POOL):
        at = first + (i // POOL * W + i % POOL) * step
        x = tl.load(x_ptr + at, mask=valid, other=0.0)
        better = (widen(x) > widen(best)) | (widen(x) != widen(x))  # as PyTorch: the first maximum, but the last NaN
        best = tl.where(better, x, best)
        taken = tl.where(better, at, taken)
    tl.store(pooled_ptr + row * n + u, best, mask=valid)
    tl.store(taken_ptr + row * n + u, taken, mask=valid)


@triton.jit
def winner_slots(winners_ptr, u, n, base):
    """(which of a row's units u won, each winner's number in the row, their count)."""
    byte = tl.load(winners_ptr + u // 8, mask=u < n, other=0).to(tl.int32)
    won = (byte >> (u % 8)) & 1
    return won != 0, base + tl.cumsum(won, 0) - 1, tl.sum(won)


@triton.jit
def _winner_offsets_kernel(
    winners_ptr,  # (B, row_bytes) uint8
    taken_ptr,  # (B, n) int32
    offsets_ptr,  # (B, k) int32
    n,
    k,
    row_bytes,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        u = start + tl.arange(0, BLOCK)
        won, slot, count = winner_slots(winners_ptr + row * row_bytes, u, n, base)
        taken = tl.load(taken_ptr + row * n + u, mask=won, other=0)
        tl.store(offsets_ptr + row * k + slot, taken, mask=won)
        base += count


@triton.jit
def _max_pool_backward_kernel(
    grad_y_ptr,  # (B, n)
    winners_ptr,  # (B, row_bytes) uint8
    offsets_ptr,  # (B, k) int32
    grad_x_ptr,  # (B, size): zero before
    n,
    k,
    row_bytes,
    size,
    BLOCK: tl.constexpr,
):
    """Windows do not overlap, so no two winners of a row come from one place."""
    row = tl.program_id(0).to(tl.int64)
    base = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        u = start + tl.arange(0, BLOCK)
        won, slot, count = winner_slots(winners_ptr + row * row_bytes, u, n, base)
        offset = tl.load(offsets_ptr + row * k + slot, mask=won, other=0)
        grad = tl.load(grad_y_ptr + row * n + u, mask=won, other=0.0)
        tl.store(grad_x_ptr + row * size + offset, grad, mask=won)
        base += count


def row_block(n: int) -> int:
    return min(next_power_of_2(max(n, 128)), 2048)


def max_pool_k_winners2d(
    x, k, duty_cycle, boost_strength, pool, contiguous=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    P, Q = H // pool, W // pool
    n = C * P * Q
    if x.dtype == torch.float64 or x.numel() == 0 or n == 0 or k == 0 or C * H * W > MAX_N:
        return reference.max_pool_k_winners2d(x, k, duty_cycle, boost_strength, pool, contiguous)
    channels_last = not x.is_contiguous()
    pooled = torch.empty((B, n), dtype=x.dtype, device=x.device)
    taken = torch.empty((B, n), dtype=torch.int32, device=x.device)
    with on_device(x):
        sizes = n, C, H, W, P, Q
        constants = {"POOL": pool, "CHANNELS_LAST": channels_last}
        _max_pool_kernel[(B * cdiv(n, 512),)](x, pooled, taken, *sizes, **constants, BLOCK=512, num_warps=4)
        y, winners, counts = k_winners(pooled, k, duty_cycle, boost_strength, C, 1 if channels_last else P * Q)
        offsets = torch.empty((B, k), dtype=torch.int32, device=x.device)
        _winner_offsets_kernel[(B,)](winners, taken, offsets, n, k, winners.shape[1], BLOCK=row_block(n), num_warps=4)
    y = reference.from_map_rows(y, (B, C, P, Q), channels_last)
    return y.contiguous() if contiguous else y, winners, offsets, counts


def max_pool_k_winners2d_backward(grad_y, winners, offsets, height, width, channels_last) -> Tensor:
    B, C, P, Q = grad_y.shape
    n, size = C * P * Q, C * height * width
    if grad_y.numel() == 0 or offsets.numel() == 0:
        return reference.max_pool_k_winners2d_backward(grad_y, winners, offsets, height, width, channels_last)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    grad_x = torch.zeros((B, size), dtype=grad_y.dtype, device=grad_y.device)
    with on_device(grad_y):
        _max_pool_backward_kernel[(B,)](
            grad_y,
            winners,
            offsets,
            grad_x,
            n,
            offsets.shape[1],
            winners.shape[1],
            size,
            BLOCK=row_block(n),
            num_warps=4,
        )
    return reference.from_map_rows(grad_x, (B, C, height, width), channels_last)
