"""Convolution of one-channel images, batch norm, 2 x 2 max-pooling and k-winners in one op (section 3.2).

The convolution's map, four times what is pooled of it, is never written, and neither is its gradient: the weight's
gradient is a sum over the winners' patches of the image. Batch norm's part of it reaches every place of the map, but
depends on the image through the sums of products of two pixels of a patch alone, and so do the channels' moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import conv_k_winners_reference as reference
from sparsekern.ops._library import Function, define
from sparsekern.ops.k_winners import check_k_winners


def _conv_max_pool_k_winners2d_fake(
    x, weight, bias, mean, scale, k, duty_cycle, boost_strength, want_offsets=True, eps=None
):
    B, C = x.shape[0], weight.shape[0]
    P, Q = ((x.shape[d] - weight.shape[d] + 1) // 2 for d in (2, 3))
    y = torch.empty((B, C, P, Q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    winners = x.new_empty((B, (C * P * Q + 15) // 16 * 2), dtype=torch.uint8)
    offsets = x.new_empty((B, k if want_offsets else 0), dtype=torch.int32)
    return y, winners, offsets, x.new_empty((C + 1,), dtype=torch.int64)


def _side(kernel_size) -> int:
    return kernel_size[0] * kernel_size[1] + 1


# x (B, 1, H, W) and weight (C, 1, KH, KW), contiguous, as `serves` wants them. y and the convolution's map, in which
# `offsets` count, are channels-last. With mean and scale (C,) the units are those of (z - mean) * scale, scale > 0, of
# the map z; with eps, scale is the variance that it is 1 / sqrt(variance + eps) of. Only the gradient wants offsets;
# without them they are (B, 0).
define(
    "conv_max_pool_k_winners2d(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? scale, SymInt k,"
    " Tensor? duty_cycle, Tensor? boost_strength, bool want_offsets=True, float? eps=None)"
    " -> (Tensor y, Tensor winners, Tensor offsets, Tensor counts)",
    reference=reference.conv_max_pool_k_winners2d,
    fake=_conv_max_pool_k_winners2d_fake,
)
# (C, KH * KW + 1) float64: for each filter the sums over its winners of the gradient times the patch that the winner was
# taken from, and of the gradient. grad_y channels-last.
define(
    "conv_max_pool_k_winners2d_grad_weight(Tensor grad_y, Tensor winners, Tensor offsets, Tensor x, int[2] kernel_size)"
    " -> Tensor",
    reference=reference.conv_max_pool_k_winners2d_grad_weight,
    fake=lambda grad_y, winners, offsets, x, kernel_size: x.new_empty(
        (grad_y.shape[1], _side(kernel_size)), dtype=torch.float64
    ),
)
# (KH * KW + 1, KH * KW + 1) float64: the sums over images and places of p p^T, p the patch's pixels and 1.
define(
    "patch_moments(Tensor x, int[2] kernel_size) -> Tensor",
    reference=reference.patch_moments,
    fake=lambda x, kernel_size: x.new_empty((_side(kernel_size),) * 2, dtype=torch.float64),
)

_forward = torch.ops.sparsekern.conv_max_pool_k_winners2d.default
_grad_weight = torch.ops.sparsekern.conv_max_pool_k_winners2d_grad_weight.default
patch_moments = torch.ops.sparsekern.patch_moments.default


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the op takes a convolution of this input, stride 1 and no padding.

    It has no gradient of x. Whether gradients are enabled does not matter, so that both forwards of activation
    checkpointing go one way.
    """
    return (
        x.shape[1] == 1
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and weight.shape[0] % 16 == 0
        and weight.shape[3] <= 8
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


class ConvMaxPoolKWinners2dFunction(Function):
    """The op without batch norm; its gradients of weight and bias are differentiable again."""

    @staticmethod
    def forward(x, weight, bias, k, duty_cycle, boost_strength):
        return _forward(x, weight, bias, None, None, k, duty_cycle, boost_strength)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs[:3]
        _, winners, offsets, counts = output
        ctx.mark_non_differentiable(winners, offsets, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, winners, offsets)
        ctx.shape, ctx.has_bias = weight.shape, bias is not None

    @staticmethod
    def backward(ctx, grad_y, grad_winners, grad_offsets, grad_counts):
        if grad_y is None:
            return (None,) * 6
        x, winners, offsets = ctx.saved_tensors
        twice = grad_y.requires_grad and torch.is_grad_enabled()
        body = reference.conv_max_pool_k_winners2d_grad_weight if twice else _grad_weight
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        sums = body(grad_y, winners, offsets, x, ctx.shape[2:]).to(grad_y.dtype)
        return None, sums[:, :-1].reshape(ctx.shape), sums[:, -1] if ctx.has_bias else None, None, None, None


class ConvNormMaxPoolKWinners2dFunction(Function):
    """The op behind the map's own mean and scale (batch norm in training); moments: the image's patch_moments.

    With p a patch and 1 after its pixels, W the weight with the bias in its last column, and U that with the mean taken
    from the bias, the map is W p and its units z = scale U p. As batch norm's, the map's gradient is
    ``scale (g - mean(g) - z mean(g z))``, where g, the units' gradient, is zero but for the winners. So with A = sum(g p),
    which is over the winners, and M = sum(p p^T) over all N places, W's gradient sum(grad p) is
    ``scale (A - mean(g) M[last] - mean(g z) scale U M)``, ``mean(g) = A[last] / N``, ``mean(g z) = scale U . A / N``.
    """

    @staticmethod
    def forward(x, weight, bias, mean, scale, moments, k, duty_cycle, boost_strength):
        return _forward(x, weight, bias, mean, scale, k, duty_cycle, boost_strength)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, mean, scale, moments = inputs[:6]
        _, winners, offsets, counts = output
        ctx.mark_non_differentiable(winners, offsets, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, scale, moments, winners, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_winners, grad_offsets, grad_counts):
        if grad_y is None:
            return (None,) * 9
        x, weight, bias, mean, scale, moments, winners, offsets = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        sums = _grad_weight(grad_y, winners, offsets, x, weight.shape[2:])
        scale = scale.double().unsqueeze(1)
        centred = with_bias(weight, bias)
        centred[:, -1] -= mean
        places = moments[-1, -1]
        first, second = sums[:, -1:] / places, scale * (centred * sums).sum(1, keepdim=True) / places
        grad = scale * (sums - first * moments[-1] - (second * scale) * (centred @ moments))
        grad = grad.to(weight.dtype)
        grad_bias = None if bias is None else grad[:, -1]
        return None, grad[:, :-1].reshape(weight.shape), grad_bias, *(None,) * 6


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The filters' weights and, last, the bias: (C, KH * KW + 1) float64."""
    column = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight.detach().flatten(1), column.detach().unsqueeze(1)], 1).double()


def conv_moments(moments: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each channel's mean and variance over the convolution's map, float32 (C,), by the image's patch_moments."""
    filters = with_bias(weight, bias)
    mean = filters @ moments[-1] / moments[-1, -1]
    filters[:, -1] -= mean
    variance = ((filters @ moments) * filters).sum(1) / moments[-1, -1]
    return mean.float(), variance.float()


def conv_max_pool_k_winners2d_counted(x, weight, bias, k, duty_cycle, boost_strength) -> tuple[Tensor, Tensor]:
    """k-winners over the convolved and pooled map of each sample, and the channels' counts; the layer checked x."""
    x, weight = x.contiguous(), weight.contiguous()
    _check(x, weight, k, duty_cycle)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        y, _, _, counts = ConvMaxPoolKWinners2dFunction.apply(x, weight, bias, k, duty_cycle, boost_strength)
    else:
        y, _, _, counts = _forward(x, weight, bias, None, None, k, duty_cycle, boost_strength, False)
    return y, counts


def conv_norm_max_pool_k_winners2d_counted(
    x, weight, bias, mean, scale, eps, moments, k, duty_cycle, boost_strength
) -> tuple[Tensor, Tensor]:
    """The same behind batch norm by mean and scale (C,); with moments by the map's own, which they are part of, and
    differentiably; else with eps and a variance in place of the scale."""
    x, weight = x.contiguous(), weight.contiguous()
    _check(x, weight, k, duty_cycle)
    args = (k, duty_cycle, boost_strength)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        y, _, _, counts = ConvNormMaxPoolKWinners2dFunction.apply(x, weight, bias, mean, scale, moments, *args)
    else:
        y, _, _, counts = _forward(x, weight, bias, mean, scale, *args, False, eps)
    return y, counts


def _check(x: Tensor, weight: Tensor, k: int, duty_cycle: Tensor | None) -> None:
    P, Q = ((x.shape[d] - weight.shape[d] + 1) // 2 for d in (2, 3))
    check_k_winners("k_winners2d", x, k, weight.shape[0] * P * Q, duty_cycle, weight.shape[0])
