"""The gradient of a convolution's weight in float32, by the non-zeros of the incoming gradient.

Each output channel's active positions are listed. The gradient of its weights is the sum of the patches of x at these
positions, each times the incoming gradient: with x channels-last and padded, a patch is KH runs of KW C numbers. A program
adds up patches for several output channels side by side, which walk over the same images, so that these stay in L1; several
programs share the positions, and their sums are added in a fixed order. Beyond ``DENSE_FROM`` a dense kernel does the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import cdiv, dot, next_power_of_2
from sparsekern.ops.sparse_conv2d_pixels_triton import pixel_strides

# Density of the incoming gradient from which on the dense kernel works. Not measured: each product reads its number of x
# from L1, 32 a clock and multiprocessor, or L2, 8, where the dense kernel multiplies 128 pairs.
DENSE_FROM = 0.125
SPLITS = 64  # shares of the positions: programs for 132 multiprocessors, at 64 times the weight's size in partial sums
SUMS = 16384  # that a program holds in registers, 32 a thread


@triton.jit
def grad_positions(grad_y_ptr, p, o, mask, area, stride_b, stride_o, stride_p):
    """The incoming gradient (positions, channels) at positions p of output channels o."""
    at = (p // area).to(tl.int64) * stride_b + (p % area).to(tl.int64) * stride_p
    return tl.load(grad_y_ptr + at[:, None] + o.to(tl.int64)[None, :] * stride_o, mask=mask, other=0.0)


@triton.jit
def patch_pixels(p, OH, OW, PADDED_H, PADDED_W, SH: tl.constexpr, SW: tl.constexpr):
    """The first pixel of each position's patch."""
    return (p // (OH * OW) * PADDED_H + p // OW % OH * SH) * PADDED_W + p % OW * SW


@triton.jit
def patch_offsets(e, PADDED_W, C: tl.constexpr, KW: tl.constexpr):
    """Where weight e of (KH, KW, C) finds its number of x, from the patch's first pixel on."""
    return e // (KW * C) * (PADDED_W * C) + e % (KW * C)


@triton.jit
def _channel_lists_kernel(
    grad_y_ptr,  # (B, O, OH, OW) by its strides
    pixels_ptr,  # (O, positions) int32: from split * part on, the patches' first pixels of a split's active positions
    values_ptr,  # (O, positions) float32
    counts_ptr,  # (splits, O) int32
    total_ptr,  # () int32, zero before
    positions,
    part,  # positions of a split
    O,
    OH,
    OW,
    PADDED_H,
    PADDED_W,
    stride_b,
    stride_o,
    stride_p,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program (split, tile of output channels)."""
    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, positions)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = o.to(tl.int64) * positions + begin
    counts = tl.zeros((BLOCK_O,), tl.int32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (o < O)[None, :]
        value = grad_positions(grad_y_ptr, p, o, mask, OH * OW, stride_b, stride_o, stride_p)
        active = (value != 0).to(tl.int32)
        slot = first[None, :] + (counts[None, :] + tl.cumsum(active, 0) - 1)
        pixel = tl.broadcast_to(patch_pixels(p, OH, OW, PADDED_H, PADDED_W, SH, SW)[:, None], (BLOCK_P, BLOCK_O))
        tl.store(pixels_ptr + slot, pixel, mask=active != 0)
        tl.store(values_ptr + slot, value, mask=active != 0)
        counts += tl.sum(active, 0)
    tl.store(counts_ptr + tl.program_id(0) * O + o, counts, mask=o < O)
    tl.atomic_add(total_ptr, tl.sum(counts).to(tl.int64), sem="relaxed")


@triton.jit
def _sparse_grad_weight_kernel(
    x_ptr,  # (B, PADDED_H, PADDED_W, C)
    pixels_ptr,  # (O, positions)
    values_ptr,  # (O, positions)
    counts_ptr,  # (splits, O)
    total_ptr,  # ()
    sums_ptr,  # (splits, O, E) float32: E = KH KW C
    limit,
    positions,
    part,
    O,
    E,
    PADDED_W,
    C: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (split, tile of output channels, tile of the weights), if the gradient is sparse enough."""
    if tl.load(total_ptr) <= limit:
        split = tl.program_id(0).to(tl.int64)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
        patch = patch_offsets(e, PADDED_W, C, KW)
        count = tl.load(counts_ptr + split * O + o, mask=o < O, other=0)
        first = o.to(tl.int64) * positions + split * part
        acc = tl.zeros((BLOCK_O, BLOCK_E), tl.float32)
        for j in range(0, tl.max(count)):
            pixel = tl.load(pixels_ptr + first + j, mask=j < count, other=0).to(tl.int64)
            value = tl.load(values_ptr + first + j, mask=j < count, other=0.0)
            mask = (j < count)[:, None] & (e < E)[None, :]
            x = tl.load(x_ptr + (pixel * C)[:, None] + patch[None, :], mask=mask, other=0.0)
            acc += value[:, None] * x
        at = (split * O + o)[:, None] * E + e[None, :]
        tl.store(sums_ptr + at, acc, mask=(o < O)[:, None] & (e < E)[None, :])


@triton.jit
def _dense_grad_weight_kernel(
    x_ptr,  # (B, PADDED_H, PADDED_W, C)
    grad_y_ptr,  # (B, O, OH, OW) by its strides
    total_ptr,  # ()
    sums_ptr,  # (splits, O, E) float32
    limit,
    positions,
    part,
    O,
    E,
    OH,
    OW,
    PADDED_H,
    PADDED_W,
    stride_b,
    stride_o,
    stride_p,
    C: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The same if it is not."""
    if tl.load(total_ptr) > limit:
        split = tl.program_id(0).to(tl.int64)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
        patch = patch_offsets(e, PADDED_W, C, KW)
        begin = tl.program_id(0) * part
        end = tl.minimum(begin + part, positions)
        acc = tl.zeros((BLOCK_O, BLOCK_E), tl.float32)
        for start in range(begin, end, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < end)[:, None] & (o < O)[None, :]
            grad_y = grad_positions(grad_y_ptr, p, o, mask, OH * OW, stride_b, stride_o, stride_p)
            pixel = patch_pixels(p, OH, OW, PADDED_H, PADDED_W, SH, SW).to(tl.int64)
            mask = (p < end)[:, None] & (e < E)[None, :]
            x = tl.load(x_ptr + (pixel * C)[:, None] + patch[None, :], mask=mask, other=0.0)
            acc = dot(tl.trans(grad_y), x, acc)
        at = (split * O + o)[:, None] * E + e[None, :]
        tl.store(sums_ptr + at, acc, mask=(o < O)[:, None] & (e < E)[None, :])


def padded_channels_last(x: Tensor, padding: list[int]) -> Tensor:
    """(B, H + 2 PH, W + 2 PW, C), contiguous: x's own memory where that is the same."""
    if any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    return x.permute(0, 2, 3, 1).contiguous()


def tile_config(O: int, E: int) -> dict:
    """All weights of an output channel side by side where they fit, so that each patch is read by one program."""
    block_e = min(next_power_of_2(max(E, 64)), 2048)
    block_o = min(next_power_of_2(O), 16, SUMS // block_e)
    return {"BLOCK_O": block_o, "BLOCK_E": block_e, "num_warps": min(max(block_o * block_e // 1024, 4), 16)}


def grad_weight(
    grad_y: Tensor,  # (B, O, OH, OW)
    x: Tensor,  # (B, C, H, W)
    shape: torch.Size,  # (O, C, KH, KW)
    stride: list[int],
    padding: list[int],
) -> Tensor:
    O, C, KH, KW = shape
    B, _, OH, OW = grad_y.shape
    positions, E = B * OH * OW, KH * KW * C
    splits = min(SPLITS, cdiv(positions, 16))
    part = cdiv(positions, splits)
    x = padded_channels_last(x, padding)
    padded = x.shape[1:3]
    pixels = torch.empty((O, positions), dtype=torch.int32, device=x.device)
    values = torch.empty((O, positions), dtype=torch.float32, device=x.device)
    counts = torch.empty((splits, O), dtype=torch.int32, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    sums = torch.empty((splits, O, E), dtype=torch.float32, device=x.device)
    limit = int(DENSE_FROM * grad_y.numel())
    of_grad_y = OH, OW, *padded, *pixel_strides(grad_y)
    _channel_lists_kernel[(splits, cdiv(O, 8))](
        grad_y, pixels, values, counts, total, positions, part, O, *of_grad_y,
        SH=stride[0], SW=stride[1], BLOCK_P=128, BLOCK_O=8, num_warps=4,
    )  # fmt: skip
    config = tile_config(O, E)
    _sparse_grad_weight_kernel[(splits, cdiv(O, config["BLOCK_O"]), cdiv(E, config["BLOCK_E"]))](
        x, pixels, values, counts, total, sums, limit, positions, part, O, E, padded[1], C=C, KW=KW, **config
    )
    _dense_grad_weight_kernel[(splits, cdiv(O, 64), cdiv(E, 64))](
        x, grad_y, total, sums, limit, positions, part, O, E, *of_grad_y, C=C, KW=KW, SH=stride[0], SW=stride[1],
        BLOCK_P=16, BLOCK_O=64, BLOCK_E=64, num_warps=4,
    )  # fmt: skip
    return sums.sum(0).view(O, KH, KW, C).permute(0, 3, 1, 2).contiguous()
