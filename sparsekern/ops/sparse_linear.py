"""The sparse linear ops: schema, shapes, autograd, and the public function (sections 3.1 and 4.3)."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from sparsekern.ops import _check
from sparsekern.ops import sparse_linear_reference as reference
from sparsekern.ops._library import (
    Function,
    define,
    has_triton,
    has_values,
    instruction_set,
    unwrap,
    wanted_only,
)


def _sparse_linear_backward_fake(
    grad_y,
    x,
    weight,
    ccol_indices,
    row_indices,
    at_nonzeros,
    want_input,
    want_weight,
    want_bias,
    support_bits=None,
    support_plan=None,
):
    return (
        torch.empty_like(x) if want_input else x.new_empty(0),
        torch.empty_like(weight) if want_weight else x.new_empty(0),
        x.new_empty(grad_y.shape[1]) if want_bias else x.new_empty(0),
    )


define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor ccol_indices, Tensor row_indices, int out_features,"
    " Tensor? support_bits=None, Tensor? support_plan=None) -> Tensor",
    reference=reference.sparse_linear,
    fake=lambda x, weight, bias, ccol_indices, row_indices, out_features, support_bits=None, support_plan=None: (
        x.new_empty((x.shape[0], out_features))
    ),
)
# All gradients at once: a call costs as much as the sums of a small layer. (0,) in place of one that is not wanted. The
# weight and its gradient may be stored in groups where the support is that of their single outputs: see split_groups().
define(
    "sparse_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor ccol_indices, Tensor row_indices,"
    " bool at_nonzeros, bool want_input, bool want_weight, bool want_bias, Tensor? support_bits=None,"
    " Tensor? support_plan=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.sparse_linear_backward,
    fake=_sparse_linear_backward_fake,
)

# Looking an op up costs as much as a tenth of a small layer. What an overload calls, if it still does, takes 0.2 us less;
# traces want the overload itself.
_forward = torch.ops.sparsekern.sparse_linear.default
_backward = torch.ops.sparsekern.sparse_linear_backward.default
eager_forward, _eager_backward = (getattr(op, "_op", op) for op in (_forward, _backward))


class LinearOthers(NamedTuple):
    """What a layer takes beside x, weight and bias. A plain tuple of the same order does as well, and takes less time."""

    ccol_indices: Tensor
    row_indices: Tensor
    out_features: int
    sparse_input_grad: bool
    support_bits: Tensor | None = None  # see pack_support
    support_plan: Tensor | None = None  # see plan_support and plan_groups


class SparseLinearFunction(Function):
    """For traced code and under functorch's transforms."""

    @staticmethod
    def forward(
        x, weight, bias, ccol_indices, row_indices, out_features, sparse_input_grad, support_bits, support_plan
    ):
        return _forward(x, weight, bias, ccol_indices, row_indices, out_features, support_bits, support_plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ccol_indices, row_indices, _, sparse_input_grad, *prepared = inputs
        ctx.save_for_backward(x, weight, ccol_indices, row_indices, *prepared)
        ctx.sparse_input_grad = sparse_input_grad

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, ccol_indices, row_indices, *prepared = ctx.saved_tensors
        body = reference.sparse_linear_backward if _is_differentiated(grad_y, x, weight) else _backward
        support = ccol_indices, row_indices
        wanted = ctx.needs_input_grad[:3]
        gradients = body(grad_y, x, weight, *support, ctx.sparse_input_grad, *wanted, *prepared)
        return *wanted_only(ctx, *gradients), None, None, None, None, None, None


class EagerSparseLinearFunction(torch.autograd.Function):
    """The same for all else: one argument for what needs no gradient, kept as it is.

    A step of a 64 x 64 layer takes 3 us less, a tenth (Zen 5).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, others):
        ccol_indices, row_indices, out_features, _, support_bits, support_plan = ctx.others = others
        ctx.save_for_backward(x, weight)
        return eager_forward(x, weight, bias, ccol_indices, row_indices, out_features, support_bits, support_plan)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        ccol_indices, row_indices, _, sparse_input_grad, *prepared = ctx.others
        want_x, want_weight, want_bias, _ = ctx.needs_input_grad
        twice = is_grad_enabled() and _is_differentiated(grad_y, x, weight)
        body = reference.sparse_linear_backward if twice else _eager_backward
        grad_x, grad_weight, grad_bias = body(
            grad_y, x, weight, ccol_indices, row_indices, sparse_input_grad, want_x, want_weight, want_bias, *prepared
        )
        return grad_x if want_x else None, grad_weight if want_weight else None, grad_bias if want_bias else None, None


_apply_eager = super(torch.autograd.Function, EagerSparseLinearFunction).apply


def _is_differentiated(*inputs: Tensor) -> bool:
    """Whether a backward pass is to be differentiated again, which goes through the plain bodies."""
    return is_grad_enabled() and any(t.requires_grad for t in inputs)


def pack_support(ccol_indices: Tensor, row_indices: Tensor, out_features: int, group_size: int) -> Tensor | None:
    """The support as a bitmap for the kernels, or None where they do not use one.

    On CPU int64 (I, ceil(O / 64)): bit o % 64 of word o // 64 is set where the weight of output o exists. On GPUs see
    :func:`pack_words`.
    """
    size = (len(ccol_indices) - 1) * out_features
    if group_size != 1 or len(row_indices) * 20 < size:  # few weights: their indices do
        return None
    if ccol_indices.device.type == "cuda":
        return pack_words(ccol_indices, row_indices, out_features) if has_triton() and len(row_indices) < size else None
    if ccol_indices.device.type != "cpu" or instruction_set() != "avx512":
        return None
    words = -(-out_features // 64)
    rows = row_indices.long()
    bits = rows.new_zeros((len(ccol_indices) - 1) * words)
    bits.index_add_(
        0,
        reference.block_inputs(ccol_indices, len(row_indices)) * words + rows // 64,
        torch.ones_like(rows) << rows % 64,
    )
    return bits.view(-1, words)


PLAN_OUTPUTS, PLAN_INPUTS = 256, 96  # of a cell: kPlanOutputs and kPlanInputs of csrc/sparse_linear.h


def plan_groups(ccol_indices: Tensor, row_indices: Tensor, groups: int) -> Tensor | None:
    """The blocks of each group of sixteen outputs or more, or None where the kernels of the CPU would not use them.

    int32, three lists one after the other: ``starts`` says where each group's blocks begin, ``input`` is a block's input
    and ``source`` the stored block, by rising input.
    """
    blocks = len(row_indices)
    if not row_indices.is_cpu or blocks * 4 > 3 * groups * (len(ccol_indices) - 1):  # as good as dense
        return None
    source = torch.argsort(row_indices, stable=True)
    starts = torch.nn.functional.pad(torch.bincount(row_indices, minlength=groups).cumsum(0), (1, 0))
    return torch.cat((starts, reference.block_inputs(ccol_indices, blocks)[source], source)).int()


def plan_support(
    ccol_indices: Tensor, row_indices: Tensor, out_features: int, support_bits: Tensor | None
) -> Tensor | None:
    """The order in which the forward pass of many rows meets the weights of single outputs, or None where it has no use.

    int32, five lists one after the other. Outputs and inputs are cut into cells; an entry is an output of a cell that has
    weights in it. ``cells`` says where each cell's entries begin, ``starts`` where each entry's weights do, ``output`` is
    the number of an entry's output in its cell, ``input`` the number of a weight's input in it, and ``source`` the stored
    weight. Entries of a cell are ordered by their number of weights.
    """
    in_features, size = len(ccol_indices) - 1, (len(ccol_indices) - 1) * out_features
    if support_bits is None or support_bits.dtype != torch.int64 or len(row_indices) * 4 > size:
        return None
    inputs, outputs = reference.block_inputs(ccol_indices, len(row_indices)), row_indices.long()
    parts = -(-in_features // PLAN_INPUTS)
    cells = parts * -(-out_features // PLAN_OUTPUTS)
    cell = outputs // PLAN_OUTPUTS * parts + inputs // PLAN_INPUTS
    entry = cell * PLAN_OUTPUTS + outputs % PLAN_OUTPUTS
    counts = torch.bincount(entry, minlength=cells * PLAN_OUTPUTS)
    by_count = (cell * (PLAN_INPUTS + 1) + counts[entry]) * PLAN_OUTPUTS + outputs % PLAN_OUTPUTS
    source = torch.argsort(by_count, stable=True)  # of an output's weights those of lower inputs are stored first
    entry = torch.unique_consecutive(entry[source])
    lists = (
        torch.searchsorted(entry, torch.arange(cells + 1, device=entry.device) * PLAN_OUTPUTS),
        torch.nn.functional.pad(counts[entry].cumsum(0), (1, 0)),
        entry % PLAN_OUTPUTS,
        inputs[source] % PLAN_INPUTS,
        source,
    )
    return torch.cat(lists).int()


def split_groups(ccol_indices: Tensor, row_indices: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The support of the same weights, in the same order, as single outputs.

    The CPU's op takes the weight with it as it is stored, in groups: a view costs as much as the sums of a small layer.
    """
    lanes = torch.arange(group_size, dtype=row_indices.dtype, device=row_indices.device)
    return ccol_indices * group_size, (row_indices[:, None] * group_size + lanes).flatten()


def pack_words(ccol_indices: Tensor, row_indices: Tensor, out_features: int) -> Tensor:
    """int32 (I, ceil(O / 32), 2): the bits of 32 outputs of an input, and the number of the first weight among them."""
    in_features, words = len(ccol_indices) - 1, -(-out_features // 32)
    rows = row_indices.long()
    word = reference.block_inputs(ccol_indices, len(rows)) * words + rows // 32
    zeros, ones = rows.new_zeros(in_features * words), torch.ones_like(rows)
    bits = zeros.index_add(0, word, ones << rows % 32)  # each bit once, so in any order
    counts = zeros.index_add(0, word, ones)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    return torch.stack((bits, counts.cumsum(0) - counts), 1).int().view(in_features, words, 2)


def support_problem(ccol_indices: Tensor, row_indices: Tensor, groups: int) -> str | None:
    """What is wrong with the values of indices, if anything: the kernels read and write where they say."""
    ccol, rows = ccol_indices, row_indices
    if ccol[0] != 0 or ccol[-1] != len(rows) or (ccol.diff() < 0).any():
        return "wants ccol_indices ascending from 0 to the number of blocks"
    if len(rows) and (rows.min() < 0 or rows.max() >= groups):
        return f"wants row_indices in 0..{groups - 1}, got {int(rows.min())}..{int(rows.max())}"
    first = rows.new_zeros(len(rows) + 1, dtype=torch.bool).index_fill(0, ccol.long(), True)
    if ((rows.diff() <= 0) & ~first[1:-1]).any():
        return "wants row_indices ascending within each input"
    return None


def check_support(ccol_indices: Tensor, row_indices: Tensor, groups: int) -> None:
    """Raises where indices are no support, as far as that can be told without waiting for a device.

    Tensors that did not change since are not looked at again.
    """
    if not (has_values(ccol_indices) and has_values(row_indices) and ccol_indices.is_cpu):
        return
    versions = [t._version for t in (ccol_indices, row_indices) if not t.is_inference()]
    last, *seen = _checked.get(row_indices, (None,))
    if len(versions) == 2 and last is not None and last() is ccol_indices and seen == [versions, groups]:
        return
    problem = support_problem(ccol_indices, row_indices, groups)
    if problem:
        raise ValueError(f"sparse_linear: {problem}")
    _checked[row_indices] = (weakref.ref(ccol_indices), versions, groups)


# row_indices -> the ccol_indices, versions and groups that they were found right with.
_checked = WeakIdKeyDictionary()


def check_sparse_linear(x, weight, ccol_indices, row_indices, out_features, bias) -> None:
    op = "sparse_linear"
    _check.is_float_tensor(op, "x", x)
    _check.is_float_tensor(op, "weight", weight)
    for name, t in (("ccol_indices", ccol_indices), ("row_indices", row_indices)):
        _check.is_tensor(op, name, t)
        if t.dtype != torch.int32:
            raise TypeError(f"{op}: wants {name} in int32, got {t.dtype}")
        if t.dim() != 1:
            raise ValueError(f"{op}: wants {name} of one dimension, got shape {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{op}: wants all tensors on one device, got x on {x.device} and {name} on {t.device}")
    _check.integer(op, "out_features", out_features, 1)
    in_features = len(ccol_indices) - 1
    if in_features < 1:
        raise ValueError(f"{op}: wants ccol_indices of at least 2 elements, got {len(ccol_indices)}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: wants x of shape (..., {in_features}), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != len(row_indices) or weight.shape[1] == 0:
        raise ValueError(f"{op}: wants weight of shape ({len(row_indices)}, group_size), got {tuple(weight.shape)}")
    if bias is not None:
        _check.shape(op, "bias", bias, (out_features,))


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    sparse_input_grad: bool = False,
) -> Tensor:
    """``F.linear`` with a weight of which only some blocks exist, at the cost of what is not zero (section 4.3).

    The weight is kept in compressed-sparse-column order, blocks of ``group_size`` outputs by one input (PyTorch's
    ``sparse_bsc`` layout). Zeros of x are found and skipped where that is faster: a zero times an infinite or NaN weight
    counts as zero there, and as NaN elsewhere.

    Args:
        x: (..., I), float32, float64, bfloat16 or float16; dense or sparse.
        weight: (blocks, group_size), the dtype of x.
        ccol_indices: (I + 1,) int32, ascending: where the blocks of each input begin.
        row_indices: (blocks,) int32: each block's group of outputs, ascending within an input. The values of both are
            checked on the CPU where they are new or have changed, which :class:`SparseLinear` need not do; on a GPU and
            in compiled code they are not.
        out_features: O; the last of the ceil(O / group_size) groups may be smaller.
        bias: (O,) or None.
        sparse_input_grad: compute dL/dx only where x is not zero: right, and cheaper, where whatever produced x drops
            the rest (k-winners, ReLU, dropout).

    Returns:
        (..., O) in the dtype of x. Sums are taken in float32 (float64 for float64), in an order that does not depend
        on the number of threads.

    Raises:
        ValueError: wrong shapes, tensors on different devices, indices that are no support.
        TypeError: not floating point, different dtypes, indices not int32.
    """
    check_sparse_linear(x, weight, ccol_indices, row_indices, out_features, bias)
    check_support(ccol_indices, row_indices, -(-out_features // weight.shape[1]))
    others = LinearOthers(ccol_indices, row_indices, out_features, sparse_input_grad)
    return _sparse_linear(x, weight, bias, others)


def sparse_linear_prepared(x: Tensor, weight: Tensor, bias: Tensor | None, others: tuple) -> Tensor:
    """:func:`sparse_linear` with what was prepared once for the support: see :class:`LinearOthers`."""
    ccol_indices, row_indices, out_features, *_ = others
    check_sparse_linear(x, weight, ccol_indices, row_indices, out_features, bias)
    return _sparse_linear(x, weight, bias, others)


def _sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, others: tuple) -> Tensor:
    """Of any rank of x, and under autocast."""
    x, weight, bias = _check.autocast("sparse_linear", x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _of_rows(rows, weight, bias, others).view(*x.shape[:-1], others[2])


def _of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, others: tuple) -> Tensor:
    """x (B, I), all checked."""
    if not (is_compiling() or are_transforms_active()):
        return sparse_linear_eager(x, weight, bias, others)
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return SparseLinearFunction.apply(x, weight, bias, *others)
    ccol_indices, row_indices, out_features, _, *prepared = others
    return _forward(x, weight, bias, ccol_indices, row_indices, out_features, *prepared)


def sparse_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None, others: tuple) -> Tensor:
    """The same, neither traced nor under a transform. What is wrong with x on a CPU the op finds itself (RuntimeError)."""
    if is_grad_enabled() and (weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply_eager(unwrap(x), unwrap(weight), unwrap(bias), others)
    ccol_indices, row_indices, out_features, _, support_bits, support_plan = others
    return eager_forward(x, weight, bias, ccol_indices, row_indices, out_features, support_bits, support_plan)
