"""The sparse linear layer for small batches: each weight row that any sample needs is read once, the others never.

``rows`` is the weight as (I, stride): as stored where every block exists, else laid out by :func:`densify_rows`; or the
weight stays packed, and bits of its support say where each value belongs (see ``pack_words``). Lists of
active inputs are made part by part of the inputs, each as long as the part may need, so no number has to reach the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekern.ops._triton import cdiv, dot, multiprocessors, narrow, next_power_of_2, popcount, widen


@triton.jit
def any_active(x_ptr, i, valid, B, I, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr):
    """Which of the inputs i some sample has."""
    active = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        x = tl.load(x_ptr + b[:, None] * I + i[None, :], mask=(b < B)[:, None] & valid[None, :], other=0.0)
        active = tl.maximum(active, tl.max((widen(x) != 0).to(tl.int32), 0))
    return active


@triton.jit
def _densify_rows_kernel(
    weight_ptr,  # (blocks, G)
    ccol_ptr,  # (I + 1,)
    row_ptr,  # (blocks,)
    x_ptr,  # (B, I)
    rows_ptr,  # (I, stride)
    B,
    I,
    stride,
    G: tl.constexpr,
    ONLY_ACTIVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i by program i: first zeros, then its blocks. Rows of inputs that no sample has are left unwritten."""
    i = tl.program_id(0)
    wanted = True
    if ONLY_ACTIVE:
        one = i + tl.arange(0, 1)
        wanted = tl.max(any_active(x_ptr, one, one < I, B, I, 1, BLOCK_B)) > 0
    if wanted:
        rows_ptr += i.to(tl.int64) * stride
        for start in range(0, stride, BLOCK):
            o = start + tl.arange(0, BLOCK)
            tl.store(rows_ptr + o, tl.zeros((BLOCK,), rows_ptr.dtype.element_ty), mask=o < stride)
        tl.debug_barrier()  # the zeros before the values
        begin = tl.load(ccol_ptr + i)
        values = (tl.load(ccol_ptr + i + 1) - begin) * G
        weight_ptr += begin.to(tl.int64) * G
        for start in range(0, values, BLOCK):
            e = start + tl.arange(0, BLOCK)
            group = tl.load(row_ptr + begin + e // G, mask=e < values, other=0)
            value = tl.load(weight_ptr + e, mask=e < values, other=0.0)
            tl.store(rows_ptr + group * G + e % G, value, mask=e < values)


@triton.jit
def _active_inputs_kernel(
    x_ptr,  # (B, I)
    lists_ptr,  # (parts, PART) int32: each part's active inputs, ascending
    counts_ptr,  # (parts,) int32
    B,
    I,
    PART: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    part = tl.program_id(0)
    i = part * PART + tl.arange(0, PART)
    active = any_active(x_ptr, i, i < I, B, I, PART, BLOCK_B)
    slot = tl.cumsum(active, 0) - 1
    tl.store(lists_ptr + part * PART + slot, i, mask=active != 0)
    tl.store(counts_ptr + part, tl.sum(active))


@triton.jit
def expand_rows(weight_ptr, support_ptr, i, o, mask, words):
    """Rows i of the packed weight at outputs o: a value's number is its word's first plus the bits below its own."""
    at = (i[:, None] * words + (o // 32)[None, :]) * 2
    bits = tl.load(support_ptr + at, mask=mask, other=0)
    first = tl.load(support_ptr + at + 1, mask=mask, other=0)
    shift = (o % 32)[None, :]
    exists = ((bits >> shift) & 1) != 0
    number = first + popcount(bits & ((1 << shift) - 1))
    return tl.load(weight_ptr + number, mask=mask & exists, other=0.0)


@triton.jit
def _rows_forward_kernel(
    x_ptr,  # (B, I)
    rows_ptr,  # (I, stride), or with PACKED (blocks,)
    support_ptr,  # with PACKED (I, stride, 2) int32
    lists_ptr,  # (parts, PART)
    counts_ptr,  # (parts,)
    sums_ptr,  # (parts, B, O) float32
    B,
    I,
    O,
    stride,
    PACKED: tl.constexpr,
    TF32: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (part of the inputs, tile of outputs): the part's share of the sums."""
    tiles = tl.cdiv(O, BLOCK_O)
    part = tl.program_id(0) // tiles
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.arange(0, BLOCK_B).to(tl.int64)
    count = tl.load(counts_ptr + part)
    acc = tl.zeros((BLOCK_K, BLOCK_O), tl.float32) if BLOCK_B == 1 else tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for start in range(0, count, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        i = tl.load(lists_ptr + part * PART + j, mask=j < count, other=0).to(tl.int64)
        mask = (j < count)[:, None] & (o < O)[None, :]
        if PACKED:
            w = expand_rows(rows_ptr, support_ptr, i, o, mask, stride)
        else:
            w = tl.load(rows_ptr + i[:, None] * stride + o[None, :], mask=mask, other=0.0)
        if BLOCK_B == 1:
            x = tl.load(x_ptr + i, mask=j < count, other=0.0)
            acc += widen(w) * widen(x)[:, None]
        else:
            live = (b < B)[:, None] & (j < count)[None, :]
            x = tl.load(x_ptr + b[:, None] * I + i[None, :], mask=live, other=0.0)
            acc = dot(x, w, acc, TF32)
    sums_ptr += part.to(tl.int64) * B * O
    if BLOCK_B == 1:
        tl.store(sums_ptr + o, tl.sum(acc, 0), mask=o < O)
    else:
        tl.store(sums_ptr + b[:, None] * O + o[None, :], acc, mask=(b < B)[:, None] & (o < O)[None, :])


@triton.jit
def _add_parts_kernel(
    sums_ptr,  # (parts, B, O) float32
    bias_ptr,  # (O,)
    y_ptr,  # (B, O)
    size,
    O,
    parts,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PARTS at a time, so that they are read at the same time."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        mask = (part < parts)[:, None] & (e < size)[None, :]
        sums += tl.load(sums_ptr + part[:, None] * size + e[None, :], mask=mask, other=0.0)
    acc = tl.sum(sums, 0)
    if BIAS:
        acc += widen(tl.load(bias_ptr + e % O, mask=e < size, other=0.0))
    tl.store(y_ptr + e, narrow(acc, y_ptr.dtype.element_ty), mask=e < size)


@triton.jit
def _rows_grad_input_kernel(
    grad_y_ptr,  # (B, O)
    x_ptr,  # (B, I)
    rows_ptr,  # (I, stride)
    lists_ptr,  # (parts, PART)
    counts_ptr,  # (parts,)
    grad_x_ptr,  # (B, I): zero before, if AT_NONZEROS
    B,
    I,
    O,
    stride,
    AT_NONZEROS: tl.constexpr,
    TF32: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (part, tile of inputs): the gradient of BLOCK_K active inputs of the part, or of all, for every sample."""
    part = tl.program_id(0) // (PART // BLOCK_K)
    first = tl.program_id(0) % (PART // BLOCK_K) * BLOCK_K
    j = first + tl.arange(0, BLOCK_K)
    count = tl.load(counts_ptr + part) if AT_NONZEROS else tl.minimum(I - part * PART, PART)
    if first < count:
        if AT_NONZEROS:
            i = tl.load(lists_ptr + part * PART + j, mask=j < count, other=0).to(tl.int64)
        else:
            i = (part * PART + j).to(tl.int64)
        b = tl.arange(0, BLOCK_B).to(tl.int64)
        if BLOCK_B == 1:
            partial = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
        else:
            acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for start in range(0, O, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            mask = (j < count)[:, None] & (o < O)[None, :]
            w = tl.load(rows_ptr + i[:, None] * stride + o[None, :], mask=mask, other=0.0)
            if BLOCK_B == 1:
                partial += widen(w) * widen(tl.load(grad_y_ptr + o, mask=o < O, other=0.0))[None, :]
            else:
                live = (b < B)[:, None] & (o < O)[None, :]
                grad_y = tl.load(grad_y_ptr + b[:, None] * O + o[None, :], mask=live, other=0.0)
                acc = dot(grad_y, tl.trans(w), acc, TF32)
        if BLOCK_B == 1:
            acc = tl.sum(partial, 1)[None, :]
        at = b[:, None] * I + i[None, :]
        keep = (b < B)[:, None] & (j < count)[None, :]
        if AT_NONZEROS:
            keep = keep & (widen(tl.load(x_ptr + at, mask=keep, other=0.0)) != 0)
        tl.store(grad_x_ptr + at, narrow(acc, grad_x_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _rows_grad_weight_kernel(
    grad_y_ptr,  # (B, O)
    x_ptr,  # (B, I)
    ccol_ptr,  # (I + 1,)
    row_ptr,  # (blocks,)
    grad_weight_ptr,  # (blocks, G)
    B,
    I,
    O,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: the gradient of input i's blocks. Gradients of samples without the input are not read."""
    i = tl.program_id(0)
    begin = tl.load(ccol_ptr + i)
    values = (tl.load(ccol_ptr + i + 1) - begin) * G
    grad_weight_ptr += begin.to(tl.int64) * G
    for start in range(0, values, BLOCK):
        e = start + tl.arange(0, BLOCK)
        o = tl.load(row_ptr + begin + e // G, mask=e < values, other=0) * G + e % G
        valid = (e < values) & (o < O)
        acc = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, B, BLOCK_B):
            b = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
            x = widen(tl.load(x_ptr + b * I + i, mask=b < B, other=0.0))
            live = (x != 0)[:, None] & valid[None, :]
            grad_y = widen(tl.load(grad_y_ptr + b[:, None] * O + o[None, :], mask=live, other=0.0))
            acc += tl.sum(grad_y * x[:, None], 0)
        tl.store(grad_weight_ptr + e, narrow(acc, grad_weight_ptr.dtype.element_ty), mask=e < values)


def densify_rows(weight, ccol_indices, row_indices, out_features, active_in: Tensor | None) -> Tensor:
    """The weight as (I, stride), the first O of each row its outputs; only what `active_in` (B, I) needs is defined."""
    I, G = len(ccol_indices) - 1, weight.shape[1]
    stride = cdiv(out_features, G) * G
    if weight.numel() == I * stride:  # every block exists, and they are ordered by input, then group
        return weight.view(I, stride)
    rows = torch.empty((I, stride), dtype=weight.dtype, device=weight.device)
    x = weight if active_in is None else active_in
    _densify_rows_kernel[(I,)](
        weight,
        ccol_indices,
        row_indices,
        x,
        rows,
        x.shape[0],
        I,
        stride,
        G=G,
        ONLY_ACTIVE=active_in is not None,
        BLOCK_B=16,
        BLOCK=512,
        num_warps=4,
    )
    return rows


def part_length(B: int, I: int, tiles: int, x: Tensor) -> int:
    """How many inputs a program goes through: enough programs to fill the device, with at least 64 inputs each."""
    programs = (8 if B == 1 else 4) * multiprocessors(x)
    return next_power_of_2(min(max(cdiv(I, cdiv(programs, tiles)), 64), 2048))


def active_inputs(x: Tensor, part: int) -> tuple[Tensor, Tensor]:
    B, I = x.shape
    parts = cdiv(I, part)
    lists = torch.empty((parts, part), dtype=torch.int32, device=x.device)
    counts = torch.empty(parts, dtype=torch.int32, device=x.device)
    block_b = min(next_power_of_2(B), max(1, 4096 // part))
    _active_inputs_kernel[(parts,)](x, lists, counts, B, I, PART=part, BLOCK_B=block_b, num_warps=4)
    return lists, counts


def block_b(B: int) -> int:
    """Rows of a tile: what tl.dot takes, or one."""
    return 1 if B == 1 else max(16, next_power_of_2(B))


def forward(x: Tensor, rows: Tensor, bias: Tensor | None, O: int, tf32: bool, support: Tensor | None = None) -> Tensor:
    """With the support (I, words, 2), rows is the packed weight."""
    B, I = x.shape
    block_o = 128
    tiles = cdiv(O, block_o)
    part = part_length(B, I, tiles, x)
    lists, counts = active_inputs(x, part)
    parts = len(counts)
    sums = torch.empty((parts, B, O), dtype=torch.float32, device=x.device)
    _rows_forward_kernel[(tiles * parts,)](
        x,
        rows,
        counts if support is None else support,
        lists,
        counts,
        sums,
        B,
        I,
        O,
        rows.shape[1] if support is None else support.shape[1],
        PACKED=support is not None,
        TF32=tf32,
        PART=part,
        BLOCK_B=block_b(B),
        BLOCK_O=block_o,
        BLOCK_K=16 if B == 1 and (support is not None or x.dtype == torch.float32) else 32,
        num_warps=8 if B > 1 and (support is not None or x.dtype == torch.float32) else 4,
    )
    y = torch.empty((B, O), dtype=x.dtype, device=x.device)
    _add_parts_kernel[(cdiv(B * O, 64),)](
        sums, sums if bias is None else bias, y, B * O, O, parts, BIAS=bias is not None, PARTS=32, BLOCK=64, num_warps=4
    )
    return y


def grad_input(grad_y: Tensor, x: Tensor, rows: Tensor, at_nonzeros: bool, tf32: bool) -> Tensor:
    B, I = x.shape
    O = grad_y.shape[1]
    part, block_k = 256, 16 if B == 1 else 32
    parts = cdiv(I, part)
    if at_nonzeros:
        lists, counts = active_inputs(x, part)
        grad_x = torch.zeros_like(x)
    else:
        lists = counts = grad_x = torch.empty_like(x)
    _rows_grad_input_kernel[(parts * (part // block_k),)](
        grad_y,
        x,
        rows,
        lists,
        counts,
        grad_x,
        B,
        I,
        O,
        rows.shape[1],
        AT_NONZEROS=at_nonzeros,
        TF32=tf32,
        PART=part,
        BLOCK_B=block_b(B),
        BLOCK_O=128 if B == 1 else 64,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, ccol_indices: Tensor, row_indices: Tensor, group_size: int) -> Tensor:
    B, I = x.shape
    result = torch.empty((len(row_indices), group_size), dtype=x.dtype, device=x.device)
    _rows_grad_weight_kernel[(I,)](
        grad_y,
        x,
        ccol_indices,
        row_indices,
        result,
        B,
        I,
        grad_y.shape[1],
        G=group_size,
        BLOCK_B=min(next_power_of_2(B), 16),
        BLOCK=256,
        num_warps=4,
    )
    return result
