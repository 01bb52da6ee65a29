"""k-winners in plain PyTorch: the oracle of the tests, and the body where no kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor


def boost_factors(duty_cycle: Tensor, target_density: float, boost_strength: Tensor) -> Tensor:
    """``exp(boost_strength * (target_density - duty_cycle))`` (Algorithm 1), float32.

    Taken in float64 and rounded once, so that every backend multiplies by the same numbers. The exponent stays within
    -87..88: beyond, a factor would be 0 or infinite, and its product with an infinite or a zero unit NaN, which wins.
    """
    return torch.exp((boost_strength.double() * (target_density - duty_cycle.double())).clamp(-87, 88)).float()


def unit_channels(n: int, channels: int, inner: int, device) -> Tensor:
    """The channel of each of the n units of a row: ``(u // inner) % channels``."""
    return torch.arange(n, device=device) // inner % channels


def pack_winners(mask: Tensor) -> Tensor:
    """A bool mask (rows, n) as bits, the lowest first: uint8 (rows, 2 * ceil(n / 16))."""
    rows, n = mask.shape
    bits = torch.nn.functional.pad(mask, (0, -n % 16)).view(rows, (n + 15) // 16 * 2, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_winners(winners: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_winners`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=winners.device)
    return ((winners.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :n].bool()


def k_winners(
    x: Tensor,  # (rows, n)
    k: int,
    duty_cycle: Tensor | None,  # (channels,)
    boost_strength: Tensor | None,  # () float32
    channels: int,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    channel = unit_channels(n, channels, inner, x.device)
    boosted = x.to(torch.promote_types(x.dtype, torch.float32))
    if duty_cycle is not None and boost_strength is not None:
        boosted = boosted * boost_factors(duty_cycle, k / max(n, 1), boost_strength).to(boosted.dtype)[channel]
    # Ties go to the lowest index of the logical (channel-major) order: sort in that order, stably. NaN sorts first.
    logical = torch.argsort(channel, stable=True)
    winners = logical[torch.sort(boosted[:, logical], dim=1, descending=True, stable=True).indices[:, :k]]
    mask = torch.zeros(rows, n, dtype=torch.bool, device=x.device).scatter_(1, winners, True)
    y = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    counts = torch.zeros(channels + 1, dtype=torch.int64, device=x.device)
    counts[:-1].index_add_(0, channel, mask.sum(0))
    counts[-1] = rows
    return y, pack_winners(mask), counts


def k_winners_backward(
    grad_y: Tensor,  # (rows, n)
    winners: Tensor,  # (rows, 2 * ceil(n / 16)) uint8
) -> Tensor:
    zero = torch.zeros((), dtype=grad_y.dtype, device=grad_y.device)
    return torch.where(unpack_winners(winners, grad_y.shape[1]), grad_y, zero)


def map_rows(x: Tensor, channels_last: bool) -> Tensor:
    """(B, C, H, W) -> (B, C * H * W), in (C, H, W) or (H, W, C) order."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).flatten(1)


def from_map_rows(rows: Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    """The inverse of :func:`map_rows`: a map of that memory format."""
    B, C, H, W = shape
    if channels_last:
        return rows.view(B, H, W, C).permute(0, 3, 1, 2)
    return rows.view(B, C, H, W)


def max_pool_k_winners2d(
    x: Tensor,  # (B, C, H, W)
    k: int,
    duty_cycle: Tensor | None,  # (C,)
    boost_strength: Tensor | None,  # () float32
    pool: int,
    contiguous: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last = not x.is_contiguous()
    pooled, taken = torch.nn.functional.max_pool2d(x, pool, return_indices=True)
    inner = 1 if channels_last else pooled.shape[2] * pooled.shape[3]
    y, winners, counts = k_winners(map_rows(pooled, channels_last), k, duty_cycle, boost_strength, x.shape[1], inner)
    offsets = winners_offsets(taken, winners, k, x.shape, channels_last)
    y = from_map_rows(y, pooled.shape, channels_last)
    return y.contiguous() if contiguous else y, winners, offsets, counts


def winners_offsets(taken: Tensor, winners: Tensor, k: int, shape: torch.Size, channels_last: bool) -> Tensor:
    """Where in their maps (C, H, W) or (H, W, C) the winners were taken from; taken (B, C, P, Q): h * W + w."""
    _, C, H, W = shape
    channel = torch.arange(C, device=taken.device).view(-1, 1, 1)
    offset = map_rows(taken * C + channel if channels_last else taken + channel * (H * W), channels_last)
    # The winners' units in order: a stable sort, as nonzero would wait for the device.
    order = unpack_winners(winners, offset.shape[1]).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return offset.gather(1, order[:, :k]).int()


def max_pool_k_winners2d_backward(
    grad_y: Tensor,  # (B, C, P, Q)
    winners: Tensor,  # (B, 2 * ceil(C * P * Q / 16)) uint8
    offsets: Tensor,  # (B, k) int32
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    B, C = grad_y.shape[:2]
    rows = map_rows(grad_y, channels_last)
    order = unpack_winners(winners, rows.shape[1]).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    grad_x = rows.new_zeros(B, C * height * width)
    grad_x = grad_x.scatter(1, offsets.long(), rows.gather(1, order[:, : offsets.shape[1]]))
    return from_map_rows(grad_x, (B, C, height, width), channels_last)


def channel_moments(
    x: Tensor,  # (B, C, H, W)
) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, variance


def normalise(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """``(x - mean) * scale`` by channel, in the type of mean, rounded to x's."""
    return ((x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)).to(x.dtype)


def norm_max_pool_k_winners2d(
    x: Tensor,  # (B, C, H, W)
    mean: Tensor,  # (C,) float32, or float64 for float64
    scale: Tensor,  # (C,), above 0; with eps the variance
    k: int,
    duty_cycle: Tensor | None,  # (C,)
    boost_strength: Tensor | None,  # () float32
    pool: int,
    contiguous: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = scale if eps is None else torch.rsqrt(scale + eps)
    channels_last = not x.is_contiguous()
    pooled, taken = torch.nn.functional.max_pool2d(x, pool, return_indices=True)
    units = normalise(pooled, mean, scale)
    inner = 1 if channels_last else units.shape[2] * units.shape[3]
    y, winners, counts = k_winners(map_rows(units, channels_last), k, duty_cycle, boost_strength, x.shape[1], inner)
    offsets = winners_offsets(taken, winners, k, x.shape, channels_last)
    y = from_map_rows(y, units.shape, channels_last)
    return y.contiguous() if contiguous else y, winners, offsets, counts


def norm_max_pool_k_winners2d_backward(
    grad_y: Tensor,  # (B, C, P, Q)
    y: Tensor,  # (B, C, P, Q)
    winners: Tensor,  # (B, 2 * ceil(C * P * Q / 16)) uint8
    offsets: Tensor,  # (B, k) int32
    x: Tensor,  # (B, C, H, W)
    mean: Tensor,  # (C,)
    scale: Tensor,  # (C,)
) -> Tensor:
    channels_last = not x.is_contiguous()
    wide, wide_y = grad_y.to(mean.dtype), y.to(mean.dtype)
    grad = max_pool_k_winners2d_backward(wide, winners, offsets, x.shape[2], x.shape[3], channels_last)
    sent = unpack_winners(winners, y[0].numel())  # losers send nothing back
    wide = from_map_rows(map_rows(wide, channels_last) * sent, y.shape, channels_last)
    elements = x.shape[0] * x.shape[2] * x.shape[3]
    means = [(t.sum((0, 2, 3)) / elements).view(-1, 1, 1) for t in (wide, wide * wide_y)]
    units = (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return (scale.view(-1, 1, 1) * (grad - means[0] - units * means[1])).to(x.dtype)


def update_duty_cycle_(
    duty_cycle: Tensor,  # (channels,) float32
    samples_seen: Tensor,  # () int64
    counts: Tensor,  # (channels + 1,) int64, the number of rows last
    period: int,
    rows_per_sample: int,
    locations: int,
) -> None:
    samples = counts[-1] // rows_per_sample
    seen = samples_seen + samples
    window = torch.maximum(samples, seen.clamp(max=period)).clamp(min=1).double()
    # d * (1 - B/T) + counts / (B * locations) * (B/T), with B cancelled: right for an empty batch too.
    updated = duty_cycle.double() * (1 - samples / window) + counts[:-1] / (locations * window)
    duty_cycle.copy_(updated)
    samples_seen.copy_(seen)
