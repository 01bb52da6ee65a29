"""The k-winners ops: schema, shapes, autograd, and the public functions (Algorithm 1, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.ops import _check
from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops._library import Function, define, library


def _k_winners_fake(x, k, duty_cycle, boost_strength, channels, inner):
    rows, n = x.shape
    winners = x.new_empty((rows, (n + 15) // 16 * 2), dtype=torch.uint8)
    return torch.empty_like(x), winners, x.new_empty((channels + 1,), dtype=torch.int64)


def _max_pool_k_winners2d_fake(x, k, duty_cycle, boost_strength, pool, contiguous=False):
    B, C, H, W = x.shape
    P, Q = H // pool, W // pool
    memory_format = torch.contiguous_format if contiguous or x.is_contiguous() else torch.channels_last
    y = torch.empty((B, C, P, Q), dtype=x.dtype, device=x.device, memory_format=memory_format)
    winners = x.new_empty((B, (C * P * Q + 15) // 16 * 2), dtype=torch.uint8)
    return y, winners, x.new_empty((B, k), dtype=torch.int32), x.new_empty((C + 1,), dtype=torch.int64)


def _norm_max_pool_k_winners2d_fake(x, mean, scale, k, duty_cycle, boost_strength, pool, contiguous=False, eps=None):
    return _max_pool_k_winners2d_fake(x, k, duty_cycle, boost_strength, pool, contiguous)


def _max_pool_k_winners2d_backward_fake(grad_y, winners, offsets, height, width, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*grad_y.shape[:2], height, width)
    return torch.empty(shape, dtype=grad_y.dtype, device=grad_y.device, memory_format=memory_format)


def _channel_moments_fake(x):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[1],), dtype=dtype), x.new_empty((x.shape[1],), dtype=dtype)


# Rows of n units in memory order, x contiguous. Unit u belongs to channel `u // inner % channels`, whose duty cycle
# boosts it and which its win is counted for: a plain layer has channels = n and inner = 1, (B, C, H, W) rows have
# channels = C and inner = H * W, channels-last rows channels = C and inner = 1. Ties go to the lowest index in
# channel-major order. boost_strength is a tensor, () float32, so that a new value needs no new graph; without it or a
# duty cycle nothing is boosted. `winners` has a bit a unit, `counts` the wins of each channel and, last, the number of
# rows.
define(
    "k_winners(Tensor x, SymInt k, Tensor? duty_cycle, Tensor? boost_strength, SymInt channels, SymInt inner)"
    " -> (Tensor y, Tensor winners, Tensor counts)",
    reference=reference.k_winners,
    fake=_k_winners_fake,
)
define(
    "k_winners_backward(Tensor grad_y, Tensor winners) -> Tensor",
    reference=reference.k_winners_backward,
    fake=lambda grad_y, winners: torch.empty_like(grad_y),
)
# k-winners of the maxima of pool x pool windows (what does not fill a window is left out); x contiguous or
# channels-last, and so is y unless it is to be contiguous. Units are in the order of x's memory: `winners`, and
# `offsets`, which says where in its map each winner was taken from. grad_y may be contiguous in any case.
define(
    "max_pool_k_winners2d(Tensor x, SymInt k, Tensor? duty_cycle, Tensor? boost_strength, int pool,"
    " bool contiguous=False) -> (Tensor y, Tensor winners, Tensor offsets, Tensor counts)",
    reference=reference.max_pool_k_winners2d,
    fake=_max_pool_k_winners2d_fake,
)
define(
    "max_pool_k_winners2d_backward(Tensor grad_y, Tensor winners, Tensor offsets, SymInt height, SymInt width,"
    " bool channels_last) -> Tensor",
    reference=reference.max_pool_k_winners2d_backward,
    fake=_max_pool_k_winners2d_backward_fake,
)
# Batch norm without learned scale and shift, pooling and k-winners: each channel's mean and variance over (B, H, W) in
# float32 (float64 of float64); then k-winners of the maxima of (x - mean) * scale, rounded to x's type, where pooling may
# come first as scale > 0 (with eps, scale is the variance that it is 1 / sqrt(variance + eps) of); and the gradient for
# scale = 1 / deviation and mean taken from x itself, grad_y in y's memory format.
define(
    "channel_moments(Tensor x) -> (Tensor mean, Tensor variance)",
    reference=reference.channel_moments,
    fake=_channel_moments_fake,
)
define(
    "norm_max_pool_k_winners2d(Tensor x, Tensor mean, Tensor scale, SymInt k, Tensor? duty_cycle, Tensor? boost_strength,"
    " int pool, bool contiguous=False, float? eps=None)"
    " -> (Tensor y, Tensor winners, Tensor offsets, Tensor counts)",
    reference=reference.norm_max_pool_k_winners2d,
    fake=_norm_max_pool_k_winners2d_fake,
)
define(
    "norm_max_pool_k_winners2d_backward(Tensor grad_y, Tensor y, Tensor winners, Tensor offsets, Tensor x, Tensor mean,"
    " Tensor scale) -> Tensor",
    reference=reference.norm_max_pool_k_winners2d_backward,
    fake=lambda grad_y, y, winners, offsets, x, mean, scale: torch.empty_like(x),
)
define(
    "update_duty_cycle_(Tensor(a!) duty_cycle, Tensor(b!) samples_seen, Tensor counts, int period,"
    " SymInt rows_per_sample, SymInt locations) -> ()",
    reference=reference.update_duty_cycle_,
    fake=lambda duty_cycle, samples_seen, counts, period, rows_per_sample, locations: None,
)


# The overloads themselves: a call by the op's name finds them anew each time.
_k_winners = torch.ops.sparsekern.k_winners.default
_k_winners_backward = torch.ops.sparsekern.k_winners_backward.default
_max_pool_k_winners2d = torch.ops.sparsekern.max_pool_k_winners2d.default
_max_pool_k_winners2d_backward = torch.ops.sparsekern.max_pool_k_winners2d_backward.default
channel_moments = torch.ops.sparsekern.channel_moments.default
_norm_max_pool_k_winners2d = torch.ops.sparsekern.norm_max_pool_k_winners2d.default
_norm_max_pool_k_winners2d_backward = torch.ops.sparsekern.norm_max_pool_k_winners2d_backward.default
update_duty_cycle_ = torch.ops.sparsekern.update_duty_cycle_.default


@torch.library.register_vmap("sparsekern::update_duty_cycle_", lib=library)
def _update_duty_cycle_vmap(info, in_dims, duty_cycle, samples_seen, counts, period, rows_per_sample, locations):
    """vmap makes one batch of its samples; with stacked buffers (an ensemble) each member has its own."""
    if in_dims[0] is None and in_dims[1] is None:
        counts = counts.sum(in_dims[2])
        update_duty_cycle_(duty_cycle, samples_seen, counts, period, rows_per_sample, locations)
        return None, None
    if in_dims[0] is None or in_dims[1] is None:
        raise ValueError("update_duty_cycle_: wants both duty_cycle and samples_seen stacked under vmap, got one")
    state = (duty_cycle, samples_seen, counts)
    for i in range(info.batch_size):
        member = (t if dim is None else t.select(dim, i) for t, dim in zip(state, in_dims, strict=False))
        update_duty_cycle_(*member, period, rows_per_sample, locations)
    return None, None


class KWinnersFunction(Function):
    """(rows, n) -> the output, the winners' bits and the channels' counts; only the output is differentiable."""

    @staticmethod
    def forward(x, k, duty_cycle, boost_strength, channels, inner):
        return _k_winners(x, k, duty_cycle, boost_strength, channels, inner)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, winners, counts = output
        ctx.mark_non_differentiable(winners, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(winners)

    @staticmethod
    def backward(ctx, grad_y, grad_winners, grad_counts):
        if grad_y is None:
            return (None,) * 6
        (winners,) = ctx.saved_tensors
        if grad_y.requires_grad and torch.is_grad_enabled():  # a second derivative is asked for
            grad_x = reference.k_winners_backward(grad_y, winners)
        else:
            grad_x = _k_winners_backward(grad_y.contiguous(), winners)
        return grad_x, None, None, None, None, None


class MaxPoolKWinners2dFunction(Function):
    """(B, C, H, W) -> the output, the winners' bits and offsets and the channels' counts, as the op."""

    @staticmethod
    def forward(x, k, duty_cycle, boost_strength, pool, contiguous):
        return _max_pool_k_winners2d(x, k, duty_cycle, boost_strength, pool, contiguous)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = inputs[0]
        _, winners, offsets, counts = output
        ctx.mark_non_differentiable(winners, offsets, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(winners, offsets)
        ctx.size = x.shape[2:]
        ctx.channels_last = not x.is_contiguous()

    @staticmethod
    def backward(ctx, grad_y, grad_winners, grad_offsets, grad_counts):
        if grad_y is None:
            return (None,) * 6
        winners, offsets = ctx.saved_tensors
        if grad_y.requires_grad and torch.is_grad_enabled():  # a second derivative is asked for
            body = reference.max_pool_k_winners2d_backward
        else:
            body = _max_pool_k_winners2d_backward
        if not (ctx.channels_last and _check.is_channels_last(grad_y)):
            grad_y = grad_y.contiguous()
        return body(grad_y, winners, offsets, *ctx.size, ctx.channels_last), None, None, None, None, None


class NormMaxPoolKWinners2dFunction(Function):
    """The op on a map with its own mean and scale (batch norm in training), which its gradient goes through."""

    @staticmethod
    def forward(x, mean, scale, k, duty_cycle, boost_strength, pool, contiguous):
        return _norm_max_pool_k_winners2d(x, mean, scale, k, duty_cycle, boost_strength, pool, contiguous)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mean, scale = inputs[:3]
        y, winners, offsets, counts = output
        ctx.mark_non_differentiable(winners, offsets, counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, winners, offsets, x, mean, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_winners, grad_offsets, grad_counts):
        if grad_y is None:
            return (None,) * 8
        y, winners, offsets, x, mean, scale = ctx.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.contiguous_format if y.is_contiguous() else torch.channels_last)
        grad_x = _norm_max_pool_k_winners2d_backward(grad_y, y, winners, offsets, x, mean, scale)
        return grad_x, None, None, None, None, None, None, None


def k_winners_rows(x, k, duty_cycle, boost_strength, channels, inner) -> tuple[Tensor, Tensor]:
    """The op on contiguous rows (rows, n), differentiably: the output and the counts."""
    if x.requires_grad and torch.is_grad_enabled():
        y, _, counts = KWinnersFunction.apply(x, k, duty_cycle, boost_strength, channels, inner)
    else:
        y, _, counts = _k_winners(x, k, duty_cycle, boost_strength, channels, inner)
    return y, counts


def strength_tensor(op: str, boost_strength: float, x: Tensor) -> Tensor | None:
    """A boost strength as the op wants it; None for no boosting."""
    _check.is_tensor(op, "x", x)
    _check.at_least_0(op, "boost_strength", boost_strength)
    return torch.full((), boost_strength, dtype=torch.float32, device=x.device) if boost_strength else None


def check_k_winners(op: str, x: Tensor, k: int, n: int, duty_cycle: Tensor | None, channels: int) -> None:
    if (
        type(k) is int
        and 0 <= k <= n
        and isinstance(duty_cycle, Tensor)
        and duty_cycle.dtype is torch.float32
        and duty_cycle.shape == (channels,)
        and duty_cycle.device == x.device
        and x.dtype in _check.DTYPES
    ):
        return
    # Each check takes as long as this one; they say what is wrong.
    _check.is_float_tensor(op, "x", x)
    _check.integer(op, "k", k, 0, n)
    if duty_cycle is not None:
        _check.is_tensor(op, "duty_cycle", duty_cycle)
        if duty_cycle.dtype != torch.float32:
            raise TypeError(f"{op}: wants duty_cycle in float32, got {duty_cycle.dtype}")
        _check.shape(op, "duty_cycle", duty_cycle, (channels,))
        if duty_cycle.device != x.device:
            raise ValueError(
                f"{op}: wants all tensors on one device, got x on {x.device} and duty_cycle on {duty_cycle.device}"
            )


def k_winners_counted(x, k, duty_cycle, boost_strength, *, rows=k_winners_rows) -> tuple[Tensor, Tensor]:
    """k-winners over the last dimension; the output and the units' counts (see the op)."""
    if x.dim() == 0:
        raise ValueError("k_winners: wants x of shape (..., n), got a tensor without dimensions")
    n = x.shape[-1]
    check_k_winners("k_winners", x, k, n, duty_cycle, n)
    if x.dim() == 2:  # views cost as much as a small row
        return rows(x.contiguous(), k, duty_cycle, boost_strength, n, 1)
    y, counts = rows(x.reshape(math.prod(x.shape[:-1]), n).contiguous(), k, duty_cycle, boost_strength, n, 1)
    return y.view(x.shape), counts


def k_winners2d_counted(x, k, duty_cycle, boost_strength, local, *, rows=k_winners_rows) -> tuple[Tensor, Tensor]:
    """k-winners over a feature map in x's memory format; the output and the channels' counts (see the op)."""
    _check.is_float_tensor("k_winners2d", "x", x)
    if x.dim() != 4:
        raise ValueError(f"k_winners2d: wants x of shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, H, W = x.shape
    n = C if local else C * H * W
    check_k_winners("k_winners2d", x, k, n, duty_cycle, C)
    channels_last = not x.is_contiguous() and _check.is_channels_last(x)
    if not (local or channels_last):
        y, counts = rows(x.contiguous().view(B, n), k, duty_cycle, boost_strength, C, H * W)
        return y.view(B, C, H, W), counts
    nhwc = x.permute(0, 2, 3, 1).contiguous()
    y, counts = rows(nhwc.view(B * H * W if local else B, n), k, duty_cycle, boost_strength, C, 1)
    y = y.view(B, H, W, C).permute(0, 3, 1, 2)
    return (y if channels_last else y.contiguous()), counts


def max_pool_k_winners2d_counted(x, k, duty_cycle, boost_strength, pool, contiguous) -> tuple[Tensor, Tensor]:
    """k-winners over the pooled map of each sample, and the channels' counts (see the op); the layer checked x."""
    _, C, H, W = x.shape
    check_k_winners("k_winners2d", x, k, C * (H // pool) * (W // pool), duty_cycle, C)
    if not x.is_contiguous() and not _check.is_channels_last(x):
        x = x.contiguous()
    if x.requires_grad and torch.is_grad_enabled():
        y, _, _, counts = MaxPoolKWinners2dFunction.apply(x, k, duty_cycle, boost_strength, pool, contiguous)
    else:
        y, _, _, counts = _max_pool_k_winners2d(x, k, duty_cycle, boost_strength, pool, contiguous)
    return y, counts


def norm_max_pool_k_winners2d_counted(
    x, mean, scale, eps, k, duty_cycle, boost_strength, pool, contiguous
) -> tuple[Tensor, Tensor]:
    """The same behind batch norm by mean and scale (C,): x's own, and no gradient of a gradient, unless eps is given."""
    _, C, H, W = x.shape
    check_k_winners("k_winners2d", x, k, C * (H // pool) * (W // pool), duty_cycle, C)
    args = (x, mean, scale, k, duty_cycle, boost_strength, pool, contiguous)
    if x.requires_grad and torch.is_grad_enabled():
        y, _, _, counts = NormMaxPoolKWinners2dFunction.apply(*args)
    else:
        y, _, _, counts = _norm_max_pool_k_winners2d(*args, eps)
    return y, counts


def k_winners(x: Tensor, k: int, duty_cycle: Tensor | None = None, boost_strength: float = 0.0) -> Tensor:
    """Keeps the k largest boosted units of each row and zeroes the rest (Algorithm 1).

    Winners are the k largest of ``exp(boost_strength * (k / n - duty_cycle)) * x``, the lowest index first among equals,
    NaN above every number; they pass x itself, bit for bit. The gradient is that of the output for winners, 0 elsewhere.

    Args:
        x: (..., n), float32, float64, bfloat16 or float16.
        k: winners of each row, 0..n.
        duty_cycle: (n,) float32, each unit's recent rate of winning in [0, 1]; None for no boosting.
        boost_strength: beta of Algorithm 1, at least 0; 0 for no boosting.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: wrong rank, k outside 0..n, duty_cycle of another length or device, boost_strength negative.
        TypeError: not a floating-point tensor, duty_cycle not float32, k not an integer.
    """
    return k_winners_counted(x, k, duty_cycle, strength_tensor("k_winners", boost_strength, x))[0]


def k_winners2d(
    x: Tensor, k: int, duty_cycle: Tensor | None = None, boost_strength: float = 0.0, local: bool = False
) -> Tensor:
    """k-winners of a feature map: over C*H*W of each sample, or over C at each location if local (section 3.2).

    Args:
        x: (B, C, H, W), float32, float64, bfloat16 or float16, contiguous or channels-last (kept).
        k: winners of each sample, 0..C*H*W; of each location, 0..C, if local.
        duty_cycle: (C,) float32, each channel's recent rate of winning in [0, 1]; None for no boosting.
        boost_strength: beta of Algorithm 1, at least 0; 0 for no boosting.
        local: choose winners at each location rather than in the whole map.

    Returns:
        The shape, dtype and memory format of x. Ties go to the lowest index in C, H, W order.

    Raises:
        ValueError: wrong rank, k out of range, duty_cycle of another length or device.
        TypeError: not a floating-point tensor, duty_cycle not float32, k not an integer.
    """
    return k_winners2d_counted(x, k, duty_cycle, strength_tensor("k_winners2d", boost_strength, x), local)[0]
