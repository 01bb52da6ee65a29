"""Checks of k-winners whose layer convolves first: the map in between, which may never be written, is taken in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checking import Call, Checked, check_choice, gamma, require, unit_roundoff


@dataclass
class Units:
    """What competes at every place of the map, (z - mean) * scale, and by how much it may be off."""

    values: Tensor  # (B, C, H, W)
    bound: Tensor
    scale: Tensor  # (C, 1, 1)
    mean: Tensor  # (C, 1, 1)


def check_convolved(layer: nn.Module, call: Call, duty_cycle: Tensor) -> Checked:
    """As check_k_winners, for a layer with ``conv``; call has the gradients of the convolution's parameters."""
    u = unit_roundoff(torch.promote_types(call.x.dtype, torch.float32))
    units = _units(layer, call, u)
    pooled, taken = (t.flatten(2) for t in F.max_pool2d(units.values, layer.max_pool, return_indices=True))
    y = call.y.flatten(2)
    allowed = F.max_pool2d(units.bound, layer.max_pool).flatten(2)
    require(((y - pooled).abs() <= allowed)[y != 0].all(), "the value of a winner is wrong")
    values = torch.where(y != 0, y, pooled.to(y.dtype)).view(call.y.shape)
    checked = check_choice(layer, Call(values, call.y), duty_cycle, float(2 * units.bound.max()))
    dense = call.y.shape[0] * units.values[0].numel() * layer.conv.weight[0].numel()
    checked.dense_products = checked.products = dense
    if call.grad_y is not None:
        grad = torch.where(y != 0, call.grad_y.flatten(2).double(), 0)
        _check_gradient(layer, call, units, grad, taken, u)
        checked.dense_products *= 2
        checked.products += int((grad != 0).sum()) * layer.conv.weight[0].numel()
    return checked


def _units(layer: nn.Module, call: Call, u: float) -> Units:
    conv, norm = layer.conv, layer.norm
    x, weight = call.x.double(), conv.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=weight.dtype) if conv.bias is None else conv.bias.detach().double()
    bias = bias.to(weight.device)
    z, size = F.conv2d(x, weight, bias), F.conv2d(x.abs(), weight.abs(), bias.abs())
    bound = gamma(torch.tensor(weight[0].numel() + 1.0), call.x.dtype) * size + unit_roundoff(call.x.dtype) * z.abs()
    if norm is None:
        one = torch.ones(len(weight), 1, 1, dtype=z.dtype, device=z.device)
        return Units(z, bound, one, 0 * one)
    # Means and squares may be sums of a sample's places in the accumulator's type.
    g = ((z[0, 0].numel() if norm.training else 0) + 4) * u
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    if not norm.training:
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    mean, variance = mean.view(-1, 1, 1), variance.view(-1, 1, 1)
    scale = (variance + norm.eps).rsqrt()
    values = (z - mean) * scale
    moved = g * _mean(z.abs()) + (_mean(bound) if norm.training else 0)
    relative = (2 * scale * _mean(values.abs() * bound) if norm.training else 0) + (moved * scale).square() + g + 4 * u
    bound = scale * (bound + moved) + (relative + unit_roundoff(call.y.dtype)) * values.abs()
    return Units(values, bound, scale, mean)


def _mean(t: Tensor) -> Tensor:
    return t.mean((0, 2, 3)).view(-1, 1, 1)


def _check_gradient(layer: nn.Module, call: Call, units: Units, grad: Tensor, taken: Tensor, u: float) -> None:
    """grad, taken: (B, C, P * Q), the winners' gradients and where they were taken from.

    A winner may have been taken from another place of its window whose value is within the bounds of the first: its
    gradient times the magnitudes of both patches is allowed for.
    """
    shape = units.values.shape
    at = lambda t: torch.zeros(shape, dtype=t.dtype, device=t.device).flatten(2).scatter(2, taken, t).view(shape)  # noqa: E731
    g, x, z = at(grad), call.x.double(), units.values
    window, far = layer.max_pool, torch.finfo(z.dtype).max
    others = z.flatten(2).scatter(2, taken, -far).view(shape)
    near = F.max_pool2d(z, window) - F.max_pool2d(others, window) <= 2 * F.max_pool2d(units.bound, window)
    unsure = grad.abs() * near.flatten(2)
    unsure = F.interpolate(unsure.view(call.y.shape), scale_factor=window)  # anywhere in its window
    unsure = F.pad(unsure, (0, shape[3] - unsure.shape[3], 0, shape[2] - unsure.shape[2]))
    terms = (grad != 0).sum((0, 2)).max().double()
    error = gamma(terms + layer.conv.weight[0].numel() + 8, call.x.dtype)
    wanted, size = units.scale * g, units.scale * g.abs() * error
    if layer.norm is not None:
        first, second = _mean(g), _mean(g * z)
        wanted = units.scale * (g - first - z * second)
        weight, bias = layer.conv.weight.detach().double(), layer.conv.bias
        magnitude = F.conv2d(x.abs(), weight.abs(), None if bias is None else bias.detach().double().abs())
        magnitude = units.scale * (magnitude + units.mean.abs())  # of what z is summed from
        size = size + units.scale * error * (
            _mean(g.abs()) + _mean(g.abs() * magnitude) * z.abs() + second.abs() * magnitude
        )
        # z and scale are off by the bound.
        size = size + units.scale * (_mean(g.abs() * units.bound) * z.abs() + second.abs() * units.bound)
        size = size + wanted.abs() * (units.bound / z.abs().clamp(min=0.1)).max()
    size = size + 2 * units.scale * unsure
    for name, got, of in (("weight", call.grad_weight, x), ("bias", call.grad_bias, None)):
        if got is None:
            continue
        exact, allowed = (
            _gradient(t, o, layer.conv) for t, o in ((wanted, of), (size, None if of is None else of.abs()))
        )
        allowed = allowed + unit_roundoff(got.dtype) * exact.abs()
        require(((got - exact).abs() <= allowed).all(), f"the gradient of the convolution's {name} is wrong")


def _gradient(grad: Tensor, x: Tensor | None, conv: nn.Conv2d) -> Tensor:
    return grad.sum((0, 2, 3)) if x is None else torch.nn.grad.conv2d_weight(x, conv.weight.shape, grad)
