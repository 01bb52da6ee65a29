"""The sparse-input convolution ops: schema, shapes, autograd, and the public function (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled, strided
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch.compiler import is_compiling

from sparsekern.ops import _check
from sparsekern.ops import sparse_conv2d_reference as reference
from sparsekern.ops._library import _C, Function, define, unwrap, wanted_only


def _out_size(x, kernel_size, stride, padding):
    return [(x.shape[2 + d] + 2 * padding[d] - kernel_size[d]) // stride[d] + 1 for d in (0, 1)]


def _sparse_conv2d_fake(x, weight, bias, stride, padding):
    shape = (x.shape[0], weight.shape[0], *_out_size(x, weight.shape[2:], stride, padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))


def _sparse_conv2d_backward_fake(grad_y, x, weight, stride, padding, at_nonzeros, want_input, want_weight, want_bias):
    like_weight = {"dtype": x.dtype, "device": x.device, "memory_format": reference.memory_format(weight)}
    return (
        torch.empty_like(x) if want_input else x.new_empty(0),
        torch.empty(weight.shape, **like_weight) if want_weight else x.new_empty(0),
        x.new_empty(len(weight)) if want_bias else x.new_empty(0),
    )


# x and grad_y are contiguous or channels-last; y and grad_x have x's memory format, grad_weight the weight's.
define(
    "sparse_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding) -> Tensor",
    reference=reference.sparse_conv2d,
    fake=_sparse_conv2d_fake,
)
# All gradients at once, for what the dense way shares between them; (0,) in place of one that is not wanted.
define(
    "sparse_conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, int[2] stride, int[2] padding, bool at_nonzeros,"
    " bool want_input, bool want_weight, bool want_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.sparse_conv2d_backward,
    fake=_sparse_conv2d_backward_fake,
)


# The overloads themselves: a call by the op's name finds them anew each time. What one calls, if it still does, takes
# 0.2 us less; traces want the overload itself.
forward_op = torch.ops.sparsekern.sparse_conv2d.default
eager_forward = getattr(forward_op, "_op", forward_op)
_backward = torch.ops.sparsekern.sparse_conv2d_backward.default
_eager_backward = getattr(_backward, "_op", _backward)


class SparseConv2dFunction(Function):
    """In traces and under functorch's transforms."""

    @staticmethod
    def forward(x, weight, bias, stride, padding, sparse_input_grad):
        return forward_op(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.padding, ctx.sparse_input_grad = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        # A second derivative goes through the plain bodies.
        twice = is_grad_enabled() and any(t.requires_grad for t in (grad_y, x, weight))
        body = reference.sparse_conv2d_backward if twice else _backward
        where = ctx.stride, ctx.padding, ctx.sparse_input_grad
        gradients = body(_dense_strides(grad_y), x, weight, *where, *ctx.needs_input_grad[:3])
        return *wanted_only(ctx, *gradients), None, None, None


class EagerSparseConv2dFunction(torch.autograd.Function):
    """The same for all else: one argument for stride, padding and sparse_input_grad, kept as it is."""

    @staticmethod
    def forward(ctx, x, weight, bias, others):
        stride, padding, _ = ctx.others = others
        ctx.save_for_backward(x, weight)
        return eager_forward(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        twice = is_grad_enabled() and (grad_y.requires_grad or x.requires_grad or weight.requires_grad)
        body = reference.sparse_conv2d_backward if twice else _eager_backward
        want_x, want_weight, want_bias, _ = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = body(
            _dense_strides(grad_y), x, weight, *ctx.others, want_x, want_weight, want_bias
        )
        return grad_x if want_x else None, grad_weight if want_weight else None, grad_bias if want_bias else None, None


_apply_eager = super(torch.autograd.Function, EagerSparseConv2dFunction).apply


def _is_dense_image(x: Tensor) -> bool:
    return x.is_contiguous() or _check.is_channels_last(x)


def _dense_strides(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels-last, else a contiguous copy."""
    return (
        x
        if x.shape[1] > 1 and _is_dense_image(x)
        else _plain_strides(x.contiguous(memory_format=reference.memory_format(x)))
    )


def _plain_strides(t: Tensor) -> Tensor:
    """t, with contiguous strides where one channel makes it both contiguous and channels-last.

    With channels-last strides PyTorch 2.13's dense convolution then reads past the end (5 x 5 pixels, kernel (2, 4),
    stride (1, 2)).
    """
    return t.flatten().view(t.shape) if t.shape[1] == 1 and t.is_contiguous() and t.stride(1) == 1 else t


def pair(op: str, name: str, value, low: int) -> list[int]:
    """An integer or two of them as a list of two, each at least low."""
    values = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(values) != 2:
        raise ValueError(f"{op}: wants one or two integers for {name}, got {value!r}")
    for v in values:
        _check.integer(op, name, v, low)
    return values


def check_sparse_conv2d(x, weight, bias, stride, padding) -> None:
    op = "sparse_conv2d"
    _check.is_float_tensor(op, "x", x)
    _check.is_float_tensor(op, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(f"{op}: wants weight of shape (O, C, KH, KW), got {tuple(weight.shape)}")
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1]:
        raise ValueError(f"{op}: wants x of shape (B, {weight.shape[1]}, H, W), got {tuple(x.shape)}")
    for axis, size in enumerate(x.shape[-2:]):
        if size + 2 * padding[axis] < weight.shape[2 + axis]:
            raise ValueError(
                f"{op}: wants a padded input of at least the kernel size {tuple(weight.shape[2:])}, "
                f"got {tuple(x.shape[-2:])} with padding {tuple(padding)}"
            )
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.shape[0],))


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    *,
    sparse_input_grad: bool = False,
) -> Tensor:
    """``F.conv2d`` whose cost follows the non-zeros of its input (section 4.3).

    Args:
        x: (B, C, H, W) or (C, H, W), float32, float64, bfloat16 or float16; contiguous or channels-last (kept).
        weight: (O, C, KH, KW), the dtype of x.
        bias: (O,) or None.
        stride: of the window, one or two integers of at least 1.
        padding: zeros at each border, one or two integers of at least 0.
        sparse_input_grad: compute dL/dx only where x is not zero: right, and cheaper, where whatever produced x drops
            the rest (k-winners, ReLU, dropout).

    Returns:
        (B, O, OH, OW) or (O, OH, OW), in the dtype and memory format of x.

    Raises:
        ValueError: wrong shapes, stride or padding out of range, tensors on different devices.
        TypeError: not floating point, different dtypes.
    """
    stride = pair("sparse_conv2d", "stride", stride, 1)
    padding = pair("sparse_conv2d", "padding", padding, 0)
    return sparse_conv2d_prepared(x, weight, bias, stride, padding, sparse_input_grad)


def sparse_conv2d_prepared(x, weight, bias, stride, padding, sparse_input_grad) -> Tensor:
    """``sparse_conv2d`` with stride and padding as checked pairs."""
    if _is_dense(x, weight, bias, stride, padding):
        if sparse_input_grad and x.requires_grad and is_grad_enabled():
            x = torch.hardshrink(x, 0)  # which lets no gradient through where x is zero
        return torch.conv2d(x, weight, bias)
    check_sparse_conv2d(x, weight, bias, stride, padding)
    x, weight, bias = _check.autocast("sparse_conv2d", x, weight, bias)
    batch, weight = _dense_strides(x if x.dim() == 4 else x.unsqueeze(0)), _plain_strides(weight)
    if not (is_compiling() or are_transforms_active()):
        y = sparse_conv2d_eager(batch, weight, bias, stride, padding, sparse_input_grad)
    elif is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = SparseConv2dFunction.apply(batch, weight, bias, stride, padding, sparse_input_grad)
    else:
        y = forward_op(batch, weight, bias, stride, padding)
    return y if x.dim() == 4 else y.squeeze(0)


def _is_dense(x, weight, bias, stride, padding) -> bool:
    """Whether the dense convolution takes all passes whatever the values: with one channel there is nothing to skip."""
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.dim() == weight.dim() == 4
        and x.shape[1] == weight.shape[1] == 1
        and x.is_cpu
        and weight.is_cpu
        and x.layout is strided
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype is x.dtype and bias.shape == weight.shape[:1]))
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)  # see dense_backward in csrc for float16
        and stride[0] == stride[1] == 1
        and padding[0] == padding[1] == 0
        and x.shape[2] >= weight.shape[2] > 0
        and x.shape[3] >= weight.shape[3] > 0
    )


def is_plain(x, weight) -> bool:
    """Whether the CPU may be given a layer's input as it is, neither traced nor under a transform.

    Sizes and dtypes are left to the op: close looks cost as much as a small layer.
    """
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and weight.is_cpu
        and x.dim() == 4
        and not (is_compiling() or are_transforms_active() or is_any_autocast_enabled())
        and x.layout is strided
        and x.size(1) > 1  # _plain_strides looks at single channels
        and _is_dense_image(x)
    )


def sparse_conv2d_eager(x, weight, bias, stride, padding, sparse_input_grad) -> Tensor:
    """:func:`sparse_conv2d_prepared` for x (B, C, H, W), contiguous or channels-last, neither traced nor under a transform.

    What is wrong with x on a CPU the op finds itself (RuntimeError).
    """
    if is_grad_enabled() and (weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)):
        if not sparse_input_grad and _all_dense_pays(x, weight, stride, padding):
            return torch.conv2d(x, weight, bias, stride, padding)
        return _apply_eager(unwrap(x), unwrap(weight), unwrap(bias), (stride, padding, sparse_input_grad))
    return eager_forward(x, weight, bias, stride, padding)


def _all_dense_pays(x, weight, stride, padding) -> bool:
    """Whether PyTorch's own node, which takes less time to call than ours, had better do all passes (see csrc)."""
    if type(x) is not Tensor or _C is None or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not (weight.is_contiguous() if x.is_contiguous() else _check.is_channels_last(weight)):
        return False  # results and gradients have the memory format of what they belong to
    kind = not x.is_contiguous(), x.dtype is torch.bfloat16, x.requires_grad
    return _C.all_dense_conv2d_pays(x.data_ptr(), *kind, *x.shape, *weight.shape, *stride, *padding)
