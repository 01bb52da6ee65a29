"""The sparse linear layer with groups of outputs: each group's inputs, gathered, times its weights is a dense product.

The stored order is by input, then group. A table (groups, I) of block numbers turns it into each group's list of inputs
and blocks, ascending, without sorting: the table is filled by block and compacted by row. That costs a few microseconds
for layers whose product takes tens, and needs no second copy of the indices in the layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import cdiv, dot, narrow, next_power_of_2, widen

SKIP_B = 32  # samples up to which weights are not read of inputs that none of them has


def tile_config(B: int, G: int, dtype: torch.dtype) -> dict:
    """Tiles of float32 do without the tensor cores. Of five stages the pipeliner takes two for the lists, which leaves
    three buffers for what they point to; few samples, whose weights wait for x anyway, take one less and more warps, or
    sm_100 spills; the fewest take narrower tiles, or sm_80 does."""
    few = B <= SKIP_B
    block_g = min(max(next_power_of_2(G), 16), 64 if B <= 16 else 128)
    warps = min(max(4, block_g // (8 if few else 16)), 8)
    config = {"BLOCK_B": min(max(next_power_of_2(B), 16), 128), "BLOCK_G": block_g, "num_warps": warps}
    if dtype == torch.float32:
        return {**config, "BLOCK_K": 32, "num_stages": 3}
    return {**config, "BLOCK_K": 64, "num_stages": 4 if few else 5}


@triton.jit
def _block_table_kernel(
    ccol_ptr,  # (I + 1,)
    row_ptr,  # (blocks,)
    table_ptr,  # (groups, I) int32, zero before: 1 + the number of the block
    I,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    begin = tl.load(ccol_ptr + i)
    end = tl.load(ccol_ptr + i + 1)
    for start in range(begin, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        group = tl.load(row_ptr + block, mask=block < end, other=0).to(tl.int64)
        tl.store(table_ptr + group * I + i, block + 1, mask=block < end)


@triton.jit
def _group_lists_kernel(
    table_ptr,  # (groups, I) int32
    inputs_ptr,  # (groups, I) int32: each group's inputs, ascending
    counts_ptr,  # (groups,) int32
    I,
    BLOCK: tl.constexpr,
):
    """Program g: the list of group g. The blocks' numbers are moved to the front of their own row of the table."""
    group = tl.program_id(0).to(tl.int64)
    table_ptr += group * I
    inputs_ptr += group * I
    base = tl.full((), 0, tl.int32)
    for start in range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        block = tl.load(table_ptr + i, mask=i < I, other=0)
        exists = (block != 0).to(tl.int32)
        slot = base + tl.cumsum(exists, 0) - 1
        tl.debug_barrier()  # all of the chunk is read before the front, which may reach into it, is written
        tl.store(inputs_ptr + slot, i, mask=exists != 0)
        tl.store(table_ptr + slot, block - 1, mask=exists != 0)
        tl.debug_barrier()
        base += tl.sum(exists)
    tl.store(counts_ptr + group, base)


@triton.jit
def _groups_forward_kernel(
    x_ptr,  # (I, B): a sample's inputs are a column, so that an input's samples are read together
    weight_ptr,  # (blocks, G)
    bias_ptr,  # (O,)
    inputs_ptr,  # (groups, I)
    blocks_ptr,  # (groups, I)
    counts_ptr,  # (groups,)
    y_ptr,  # (B, O)
    B,
    I,
    O,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (group, tile of its lanes, tile of samples), the samples first.

    With SKIP, weights of inputs that no sample of the tile has are not read.
    """
    LANE_TILES: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    sample_tiles = tl.cdiv(B, BLOCK_B)
    lanes = tl.program_id(0) // sample_tiles
    group = lanes // LANE_TILES
    b = tl.program_id(0) % sample_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    lane = lanes % LANE_TILES * BLOCK_G + tl.arange(0, BLOCK_G)
    inputs_ptr += group.to(tl.int64) * I
    blocks_ptr += group.to(tl.int64) * I
    count = tl.load(counts_ptr + group)
    acc = tl.zeros((BLOCK_B, BLOCK_G), tl.float32)
    for start in range(0, count, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        i = tl.load(inputs_ptr + j, mask=j < count, other=0).to(tl.int64)
        block = tl.load(blocks_ptr + j, mask=j < count, other=0).to(tl.int64)
        x = tl.load(x_ptr + i[:, None] * B + b[None, :], mask=(j < count)[:, None] & (b < B)[None, :], other=0.0)
        wanted = j < count
        if SKIP:
            wanted = wanted & (tl.max((widen(x) != 0).to(tl.int32), 1) != 0)
        mask = wanted[:, None] & (lane < G)[None, :]
        w = tl.load(weight_ptr + block[:, None] * G + lane[None, :], mask=mask, other=0.0)
        acc = dot(tl.trans(x), w, acc, TF32)
    o = group * G + lane
    valid = (lane < G) & (o < O)
    if BIAS:
        acc += widen(tl.load(bias_ptr + o, mask=valid, other=0.0))[None, :]
    y = narrow(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptr + b.to(tl.int64)[:, None] * O + o[None, :], y, mask=(b < B)[:, None] & valid[None, :])


def group_lists(ccol_indices: Tensor, row_indices: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's (inputs, blocks, count)."""
    I = len(ccol_indices) - 1
    table = torch.zeros((groups, I), dtype=torch.int32, device=ccol_indices.device)
    inputs = torch.empty_like(table)
    counts = torch.empty(groups, dtype=torch.int32, device=table.device)
    _block_table_kernel[(I,)](ccol_indices, row_indices, table, I, BLOCK=128, num_warps=1)
    _group_lists_kernel[(groups,)](table, inputs, counts, I, BLOCK=min(next_power_of_2(max(I, 128)), 2048), num_warps=4)
    return inputs, table, counts


def forward(
    x: Tensor,  # (B, I)
    weight: Tensor,  # (blocks, G)
    bias: Tensor | None,  # (O,)
    ccol_indices: Tensor,
    row_indices: Tensor,
    out_features: int,
    tf32: bool,
) -> Tensor:
    B, I = x.shape
    G = weight.shape[1]
    groups = cdiv(out_features, G)
    inputs, blocks, counts = group_lists(ccol_indices, row_indices, groups)
    y = torch.empty((B, out_features), dtype=x.dtype, device=x.device)
    config = tile_config(B, G, x.dtype)
    _groups_forward_kernel[(cdiv(B, config["BLOCK_B"]) * groups * cdiv(G, config["BLOCK_G"]),)](
        x.t().contiguous(),
        weight,
        y if bias is None else bias,
        inputs,
        blocks,
        counts,
        y,
        B,
        I,
        out_features,
        G=G,
        BIAS=bias is not None,
        SKIP=B <= SKIP_B,
        TF32=tf32,
        **config,
    )
    return y
