"""The sparse linear layer on GPUs: which way is the fastest, by shapes alone, since no count of zeros reaches the host.

- by rows (``sparse_linear_rows_triton.py``), small batches: each weight row that any sample needs is read once.
- by groups (``sparse_linear_groups_triton.py``), forward: each group's inputs gathered into dense tiles.
- by gathers (``sparse_linear_dictionary_triton.py``), a dense weight of very many inputs: rows of active inputs only.
- dense, by PyTorch's matrix product over the weight laid out densely: everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import sparse_linear_dictionary_triton as by_gathers
from sparsekern.ops import sparse_linear_groups_triton as by_groups
from sparsekern.ops import sparse_linear_reference as reference
from sparsekern.ops import sparse_linear_rows_triton as by_rows
from sparsekern.ops._triton import allows_tf32, cdiv, on_device
from sparsekern.ops.grad_bias_reference import grad_bias as sum_grad_bias

# Up to here bytes are the limit of the dense product too; beyond, almost every weight row is needed by some sample.
ROWS_B = 32


# A group's tile is as wide as the group, and the tensor cores want at least 16.
GROUPS_G = 16
# Up to which density gathered tiles beat the dense product: it runs nearer to the peak, the more so on tensor cores.
GROUPS_DENSITY, GROUPS_DENSITY_TENSOR_CORES = 0.5, 0.25

# The bytes of a weight all of which exists, from which on rows pay. Not measured: three launches in place of one take 4 us
# more in a graph, and 4.8 TB/s read 16 MiB in 3.5 us.
ROWS_BYTES = 2**24


# A dictionary: far more inputs than outputs, of which a sample has a few. Nothing else is worth a list for each sample.
DICTIONARY_I = 16384
DICTIONARY_RATIO = 8


def way(B: int, I: int, O: int, blocks: int, group_size: int) -> str:
    """Which way is the fastest, for gradients too: "rows", "gathers" or "dense"."""
    if B <= ROWS_B:
        return "rows"
    whole = blocks * group_size == I * O
    return "gathers" if whole and I >= max(DICTIONARY_I, DICTIONARY_RATIO * O) else "dense"


def forward_way(B: int, I: int, O: int, blocks: int, group_size: int, dtype: torch.dtype) -> str:
    """The same for the forward, where "groups" is one more."""
    density = blocks / (I * cdiv(O, group_size))
    tensor_cores = dtype != torch.float32 or tf32_products()
    if group_size >= GROUPS_G and density <= (GROUPS_DENSITY_TENSOR_CORES if tensor_cores else GROUPS_DENSITY):
        return "groups"
    if density == 1 and blocks * group_size * dtype.itemsize < ROWS_BYTES:
        return "dense"
    return way(B, I, O, blocks, group_size)


def tf32_products() -> bool:
    """Whether PyTorch's dense products of float32 take the tensor cores: then ours do too."""
    return allows_tf32(torch.backends.cuda.matmul, torch.backends.cudnn)


def _plain(x: Tensor, weights: int) -> bool:
    """What the plain PyTorch body serves: float64, and nothing to compute."""
    return x.dtype == torch.float64 or x.numel() == 0 or weights == 0


def sparse_linear(
    x: Tensor,  # (B, I)
    weight: Tensor,  # (blocks, G)
    bias: Tensor | None,  # (O,)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    out_features: int,
    support_bits: Tensor | None = None,  # (I, ceil(O / 32), 2) int32: see pack_words
    support_plan: Tensor | None = None,  # not needed here
) -> Tensor:
    if _plain(x, weight.numel()):
        return reference.sparse_linear(x, weight, bias, ccol_indices, row_indices, out_features)
    x = x.contiguous()
    with on_device(x):
        tf32 = tf32_products()
        chosen = forward_way(*x.shape, out_features, *weight.shape, x.dtype)
        if chosen == "groups":
            return by_groups.forward(x, weight, bias, ccol_indices, row_indices, out_features, tf32)
        if chosen == "rows" and support_bits is not None and support_bits.dtype == torch.int32:
            return by_rows.forward(x, weight, bias, out_features, tf32, support_bits)
        rows = by_rows.densify_rows(weight, ccol_indices, row_indices, out_features, x if chosen == "rows" else None)
        if chosen == "rows":
            return by_rows.forward(x, rows, bias, out_features, tf32)
        if chosen == "gathers":
            return by_gathers.forward(x, rows, bias, tf32)
        dense = rows[:, :out_features]
        return x @ dense if bias is None else torch.addmm(bias, x, dense)


def sparse_linear_backward(
    grad_y: Tensor,  # (B, O)
    x: Tensor,  # (B, I)
    weight: Tensor,  # (blocks, G)
    ccol_indices: Tensor,  # (I + 1,) int32
    row_indices: Tensor,  # (blocks,) int32
    at_nonzeros: bool,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
    support_bits: Tensor | None = None,  # not needed here
    support_plan: Tensor | None = None,  # not needed here
) -> tuple[Tensor, Tensor, Tensor]:
    if _plain(x, weight.numel()) or grad_y.numel() == 0:
        return reference.sparse_linear_backward(
            grad_y, x, weight, ccol_indices, row_indices, at_nonzeros, want_input, want_weight, want_bias
        )
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    with on_device(x):
        tf32, chosen = tf32_products(), way(*x.shape, grad_y.shape[1], *weight.shape)
        if want_input:
            grad_x = _grad_input(chosen, grad_y, x, weight, ccol_indices, row_indices, at_nonzeros, tf32)
        if want_weight:
            grad_weight = _grad_weight(chosen, grad_y, x, ccol_indices, row_indices, weight.shape[1], tf32)
        if want_bias:
            grad_bias = sum_grad_bias(grad_y)
    return grad_x, grad_weight, grad_bias


def _grad_input(chosen, grad_y, x, weight, ccol_indices, row_indices, at_nonzeros, tf32) -> Tensor:
    O = grad_y.shape[1]
    active_in = x if chosen == "rows" and at_nonzeros else None
    rows = by_rows.densify_rows(weight, ccol_indices, row_indices, O, active_in)
    if chosen == "rows":
        return by_rows.grad_input(grad_y, x, rows, at_nonzeros, tf32)
    if chosen == "gathers" and at_nonzeros:
        return by_gathers.grad_input(grad_y, x, rows, tf32)
    grad_x = grad_y @ rows[:, :O].t()
    return grad_x.masked_fill_(x == 0, 0) if at_nonzeros else grad_x


def _grad_weight(chosen, grad_y, x, ccol_indices, row_indices, group_size, tf32) -> Tensor:
    if chosen == "rows":
        return by_rows.grad_weight(grad_y, x, ccol_indices, row_indices, group_size)
    if chosen == "gathers":
        return by_gathers.grad_weight(grad_y, x, tf32).view(-1, group_size)
    return reference.compress(grad_y.t() @ x, ccol_indices, row_indices, group_size)
