"""The sparse-input convolution layer: a drop-in for ``nn.Conv2d`` (section 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsekern.nn.mask import draw_supports
from sparsekern.nn.parameters import freeze_as, whole
from sparsekern.ops import _check
from sparsekern.ops.sparse_conv2d import (
    is_plain,
    pair,
    sparse_conv2d_eager,
    sparse_conv2d_prepared,
)


class SparseConv2d(nn.Module):
    """``nn.Conv2d`` whose cost follows the non-zeros of its input; any input is right.

    With ``density < 1`` each filter also has only ``max(1, round(density * C * KH * KW))`` weights, at random places; the
    others are zero and their gradients are dropped, so that they stay zero under any optimizer that leaves a weight of
    zero gradient and zero value alone.

    Args:
        in_channels: C.
        out_channels: O, the filters.
        kernel_size: one or two integers of at least 1.
        stride: one or two integers of at least 1.
        padding: zeros at each border: one or two integers of at least 0, ``"valid"``, or ``"same"`` (stride 1 and odd
            kernels).
        bias: whether there is one.
        density: fraction of the weights that exist, in (0, 1]. It saves no time: only zeros in the input do.
        sparse_input_grad: compute the input's gradient only where the input is not zero, which is much cheaper: right
            directly behind k-winners, ReLU and dropout, which drop the rest; behind anything else the gradient would be
            wrong.
        device, dtype: of the parameters.

    Shape: x (B, C, H, W) or (C, H, W) -> (B, O, OH, OW) or (O, OH, OW), in the dtype and memory format of x.

    Raises:
        ValueError: sizes below 1, a density outside (0, 1], ``"same"`` with a stride or an even kernel; in a call, an x of
            another shape or smaller than the kernel.
        TypeError: arguments of another type, a dtype that is not float32, float64, bfloat16 or float16; in a call, an x of
            another dtype than the parameters, outside autocast.

    The state_dict is that of ``nn.Conv2d``; with ``density < 1`` it also has ``mask``, bool (O, C, KH, KW).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        *,
        density: float = 1.0,
        sparse_input_grad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        op = "SparseConv2d"
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            _check.integer(op, name, value, 1)
        _check.density(op, density)
        _check.float_dtype(op, "dtype", dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(pair(op, "kernel_size", kernel_size, 1))
        self.stride = tuple(pair(op, "stride", stride, 1))
        self.padding = tuple(_padding(op, padding, self.kernel_size, self.stride))
        self.density = density
        self.sparse_input_grad = sparse_input_grad
        shape = (out_channels, in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("mask", torch.empty(shape, dtype=torch.bool, device=device) if density < 1 else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws mask, weights and bias anew, the weights as ``nn.Conv2d`` does."""
        if self.weight.is_meta:
            return
        places = math.prod(self.weight.shape[1:])
        bound = 1 / math.sqrt(places)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.mask is not None:
            supports = draw_supports(places, self.out_channels, max(1, round(self.density * places)))
            mask = supports.new_zeros(self.out_channels, places, dtype=torch.bool).scatter_(1, supports, True)
            self.mask.copy_(mask.view_as(self.mask))
            with torch.no_grad():
                self.weight.mul_(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        # As in SparseLinear: look-ups and checks take as long as a small layer.
        parameters, mask = self._parameters, self._buffers["mask"]
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized
            weight, bias = self.weight, self.bias
        if mask is not None:
            weight = weight * mask
        stride, padding = self.stride, self.padding
        if is_plain(x, weight):
            try:  # the op checks sizes and dtypes in a tenth of the time
                return sparse_conv2d_eager(x, weight, bias, stride, padding, self.sparse_input_grad)
            except RuntimeError:
                pass  # what follows says what is wrong
        return sparse_conv2d_prepared(x, weight, bias, stride, padding, self.sparse_input_grad)

    @torch.no_grad()
    def to_dense(self) -> nn.Conv2d:
        """The ``nn.Conv2d`` that computes the same, with copies of the weights."""
        conv = nn.utils.skip_init(  # draws nothing from torch's generator
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        conv.weight.copy_(whole(self.weight) if self.mask is None else whole(self.weight) * self.mask)
        if self.bias is not None:
            conv.bias.copy_(whole(self.bias))
        return freeze_as(self, conv.train(self.training))

    @classmethod
    @torch.no_grad()
    def from_dense(cls, conv: nn.Conv2d, *, sparse_input_grad: bool = False) -> SparseConv2d:
        """Takes over an existing convolution (one group, no dilation, zero padding); its weights are copied.

        Raises:
            ValueError: a convolution with groups, dilation or another padding mode.
            TypeError: not an ``nn.Conv2d``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"SparseConv2d.from_dense: wants an nn.Conv2d, got {type(conv).__name__}")
        if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise ValueError(
                "SparseConv2d.from_dense: wants groups=1, dilation=1 and padding_mode='zeros', "
                f"got groups={conv.groups}, dilation={conv.dilation}, padding_mode={conv.padding_mode!r}"
            )
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.bias is not None,
            sparse_input_grad=sparse_input_grad,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.weight.copy_(conv.weight)
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        return freeze_as(conv, layer.train(conv.training))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, density={self.density}"
            + (", sparse_input_grad=True" if self.sparse_input_grad else "")
        )


def _padding(op: str, padding, kernel_size, stride) -> list[int]:
    if padding == "valid":
        return [0, 0]
    if padding == "same":
        if tuple(stride) != (1, 1) or any(size % 2 == 0 for size in kernel_size):
            raise ValueError(
                f"{op}: wants stride 1 and odd kernel sizes for padding='same', got stride {tuple(stride)} "
                f"and kernel_size {tuple(kernel_size)}"
            )
        return [size // 2 for size in kernel_size]
    if isinstance(padding, str):
        raise ValueError(f"{op}: wants 'valid', 'same' or integers for padding, got {padding!r}")
    return pair(op, "padding", padding, 0)
