"""Checks of a layer's results and gradients against the float64 dense layer, within bounds that are derived.

A sum of n rounded products, added up in any order, differs from the exact one by at most ``gamma(n) * sum(|products|)``,
``gamma(n) = n u / (1 - n u)`` with u the unit roundoff of the sum (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). Zero products add no error, so n counts the others. Storing the sum in bfloat16 or float16
rounds once more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk

TINY = torch.finfo(torch.float64).tiny


class WrongResult(Exception):
    """A result or gradient is outside its bound; the message says which, and by how much."""


@dataclass
class Checked:
    """What a check found, added up over its calls.

    Attributes:
        error: the largest, relative to the largest sum of magnitudes of products.
        dense_products: of the dense layer.
        products: those whose factors both exist and are not zero.
        moved: bytes that every implementation reads or writes: inputs, outputs, gradients, weights of active inputs.
        held: bytes of all these tensors, all existing weights included.
    """

    error: float = 0.0
    dense_products: int = 0
    products: int = 0
    moved: int = 0
    held: int = 0

    def __iadd__(self, other: Checked) -> Checked:
        self.error = max(self.error, other.error)
        self.dense_products += other.dense_products
        self.products += other.products
        self.moved += other.moved
        self.held += other.held
        return self


@dataclass
class Call:
    """One call of a layer: what went in and came out, and the gradients where it was a training step."""

    x: Tensor
    y: Tensor
    grad_y: Tensor | None = None
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None


def gamma(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of sum(|products|) that bounds the rounding error of sums of so many terms."""
    nu = terms * unit_roundoff(torch.promote_types(dtype, torch.float32))
    return nu / (1 - nu)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class DenseReference:
    """The float64 dense twin of a linear or convolution layer.

    A bilinear map run three times says all: on the values (the reference), on their magnitudes (the scale of the bound)
    and on 0 and 1 (how many products each sum has).
    """

    def __init__(self, layer: nn.Module):
        dense = layer.to_dense() if isinstance(layer, (sk.SparseLinear, sk.SparseConv2d)) else layer
        self.weight = dense.weight.detach()
        self.bias = None if dense.bias is None else dense.bias.detach()
        self.exists = layer.mask if isinstance(layer, sk.SparseLinear) else None
        self.stored = layer.densify if isinstance(layer, sk.SparseLinear) else lambda t: t
        self.at_nonzeros = getattr(layer, "sparse_input_grad", False)
        self.is_linear = isinstance(dense, nn.Linear)
        self.options = {} if self.is_linear else {"stride": dense.stride, "padding": dense.padding}
        self.terms = dense.weight[0].numel()

    def check(self, call: Call, *, is_dense: bool = False) -> Checked:
        """Raises :class:`WrongResult` unless the call's result and gradients are within their bounds.

        Args:
            call: its grad_weight laid out as the layer stores it.
            is_dense: a dense layer's call; gradients everywhere, weights laid out dense.
        """
        used = self._used_inputs(call)
        exact, scale, terms = (self._run(call, used, change) for change in (_same, torch.abs, _is_nonzero))
        terms[0] = terms[0] + int(self.bias is not None)
        at_nonzeros = self.at_nonzeros and not is_dense
        checked = Checked()
        for i, (name, got) in enumerate(self._results(call, is_dense)):
            if got is None:
                continue
            bound = gamma(terms[i], got.dtype) * scale[i] + torch.finfo(got.dtype).tiny
            if got.dtype == torch.float64:
                bound *= 2  # the reference rounds as much as what it is compared with
            if got.dtype in (torch.bfloat16, torch.float16):
                bound += unit_roundoff(got.dtype) * (exact[i].abs() + bound)
            if name == "grad_x" and at_nonzeros:
                exact[i], bound = exact[i] * (call.x != 0), bound * (call.x != 0)
            if name == "grad_weight" and self.exists is not None and not is_dense:
                exact[i], bound = exact[i] * self.exists, bound * self.exists
            error = _compare(name, got, exact[i], bound)
            checked.error = max(checked.error, error / float(scale[i].max().clamp(min=TINY)) if got.numel() else 0.0)
        self._count(checked, call, terms)
        return checked

    def _results(self, call: Call, is_dense: bool):
        stored = call.grad_weight if is_dense or call.grad_weight is None else self.stored(call.grad_weight)
        return [("y", call.y), ("grad_x", call.grad_x), ("grad_weight", stored), ("grad_bias", call.grad_bias)]

    def _used_inputs(self, call: Call) -> Tensor | None:
        """The inputs that are active anywhere: all that a linear layer's forward needs."""
        if not self.is_linear or call.grad_y is not None:
            return None
        return (call.x.reshape(-1, call.x.shape[-1]) != 0).any(0).nonzero().squeeze(1)

    def _run(self, call: Call, used: Tensor | None, change) -> list[Tensor | None]:
        """The layer on changed values: y, and with a grad_y the gradients of x, weight and bias."""
        x, weight = (call.x.detach(), self.weight)
        if used is not None:
            x, weight = x[..., used], weight[:, used]
        changed = [None if t is None else change(t.double()) for t in (x, weight, self.bias, call.grad_y)]
        x, weight, bias, grad_y = changed
        if change is _is_nonzero:
            bias = None if bias is None else torch.zeros_like(bias)
        if grad_y is None:
            return [self._forward(x, weight, bias), None, None, None]
        leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
        y = self._forward(x, weight, bias)
        gradients = list(torch.autograd.grad(y, leaves, grad_y))
        return [y.detach(), *gradients, *[None] * (3 - len(gradients))]

    def _forward(self, x, weight, bias):
        return F.linear(x, weight, bias) if self.is_linear else F.conv2d(x, weight, bias, **self.options)

    def _count(self, checked: Checked, call: Call, terms) -> None:
        """Of each pass the products of a dense layer, and those whose factors all exist and are not zero."""
        each = terms[0] - int(self.bias is not None)  # products of each output
        passes = 1 + (call.grad_x is not None) + (call.grad_weight is not None)
        checked.dense_products = passes * call.y.numel() * self.terms
        checked.products = round(float(each.sum()))
        if call.grad_x is not None:  # everywhere, or at the non-zeros
            checked.products += round(float((terms[1] * (call.x != 0) if self.at_nonzeros else terms[1]).sum()))
        if call.grad_weight is not None:
            checked.products += round(float((terms[2] if self.exists is None else terms[2] * self.exists).sum()))
        weights = (self.weight.numel() if self.exists is None else int(self.exists.sum())) * call.x.element_size()
        active = float((call.x != 0).flatten(0, -2).any(0).double().mean()) if self.is_linear else 1.0
        gradients = _bytes(call.grad_y, call.grad_x, call.grad_weight)
        again = call.x.nbytes + round(active * weights) if passes > 1 else 0
        checked.moved = _bytes(call.x, call.y) + round(active * weights) + gradients + again
        checked.held = _bytes(call.x, call.y) + weights + gradients


def check_k_winners(layer: nn.Module, call: Call, duty_cycle: Tensor) -> Checked:
    """k-winners by their definition in float64: k a row, none below a loser, values and gradients bit for bit.

    Args:
        duty_cycle: that of the layer before the call.
    """
    tipped = 0.0  # by how much batch norm's rounding may move a boosted value
    if getattr(layer, "norm", None) is not None:
        call, tipped = _normalised(layer, call)
    return check_choice(layer, _pooled(layer, call), duty_cycle, tipped)


def check_choice(layer: nn.Module, call: Call, duty_cycle: Tensor, tipped: float) -> Checked:
    """The choice itself, among call.x; a boosted unit may be off by ``tipped`` times the largest boost factor."""
    rows = _winner_rows(layer, call.x)
    n = rows.shape[-1]
    k = layer._k(n)
    boost = torch.exp(layer.boost_strength.double() * (k / n - duty_cycle.double()))
    if isinstance(layer, sk.KWinners2d):
        boosted = _winner_rows(layer, call.x.double() * boost.view(1, -1, 1, 1))
    else:
        boosted = rows.double() * boost
    y = _winner_rows(layer, call.y)
    won = y != 0
    count = won.sum(1)  # a winner whose value is zero looks like a loser, and changes nothing
    require(((count == k) | ((count < k) & (rows == 0).any(1))).all(), f"not {k} winners in each row")
    require(torch.equal(y[won], rows[won]), "a winner's value was changed")
    lowest = boosted.masked_fill(~won, torch.inf).amin(1)
    highest = boosted.masked_fill(won, -torch.inf).amax(1)
    # Two roundings of each, of the boost factor and of its product with x, may bring neighbours into another order.
    slack = 4 * unit_roundoff(torch.float32) * torch.maximum(lowest.abs(), highest.abs()) + tipped * boost.max()
    require((lowest >= highest - slack).all(), "a loser is above a winner")
    if call.grad_x is not None:
        grad_x, grad_y = _winner_rows(layer, call.grad_x), _winner_rows(layer, call.grad_y)
        right = torch.where(won, grad_x == grad_y, (grad_x == 0) | (rows == 0))
        require(right.all(), "the gradient is not that of the winners")
    return Checked(moved=_bytes(call.x, call.y), held=_bytes(call.x, call.y))


def _normalised(layer: nn.Module, call: Call) -> tuple[Call, float]:
    """The call as pooling behind the layer's batch norm sees it, and how far batch norm's values may be off.

    Batch norm's values at the winners and its gradient are compared with float64 here. Its values then take the place of
    the exact ones, as k-winners hands them on bit for bit.
    """
    norm, training = layer.norm, layer.norm.training
    x = call.x.double()
    mean, variance = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    if not training:
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    mean, scale = (t.view(-1, 1, 1) for t in (mean, (variance + norm.eps).rsqrt()))
    z = (x - mean) * scale
    u = unit_roundoff(torch.float64 if call.x.dtype == torch.float64 else torch.float32)
    # Means and squares are sums of a sample's pixels, those of the samples are added in float64; the mean's error counts
    # relative to the deviation, and its square in the variance.
    g = ((x[0, 0].numel() if training else 0) + 4) * u
    off = g * x.abs().mean((0, 2, 3)).view(-1, 1, 1) * scale
    relative = g + off.square() + 4 * u
    bound = off + (relative + unit_roundoff(call.y.dtype)) * z.abs()
    pooled, taken = (t.flatten(2) for t in F.max_pool2d(z, layer.max_pool, return_indices=True))
    y = call.y.flatten(2)
    right = (y - pooled).abs() <= bound.flatten(2).gather(2, taken)
    require(right[y != 0].all(), "batch norm of a winner is wrong")
    values = torch.where(y != 0, y, pooled.to(y.dtype))
    normalised = z.to(y.dtype).flatten(2).scatter(2, taken, values).view(x.shape)
    if call.grad_x is None:
        return replace(call, x=normalised), float(2 * bound.max())
    grad_y = call.grad_y.flatten(2) * (y != 0)
    grad = torch.zeros_like(z).flatten(2).scatter(2, taken, grad_y.double()).view(x.shape)
    first, second = (t.mean((0, 2, 3)).view(-1, 1, 1) for t in (grad, grad * z))
    wanted = scale * (grad - first - z * second)
    # scale is off by `relative`, the second mean and its factor by what z is; and the four products and sums round.
    size = scale * (grad.abs() + first.abs() + (z.abs() + (x.abs() + mean.abs()) * scale) * second.abs())
    means = (grad.abs() * bound).mean((0, 2, 3)).view(-1, 1, 1)
    allowed = 2 * relative * size + scale * (z.abs() * means + bound * second.abs())
    allowed = allowed + unit_roundoff(call.x.dtype) * wanted.abs()
    require(((call.grad_x - wanted).abs() <= allowed).all(), "batch norm's gradient is wrong")
    return replace(call, x=normalised, grad_x=grad.to(y.dtype)), float(2 * bound.max())


def _pooled(layer: nn.Module, call: Call) -> Call:
    """The call as the choice among the maxima sees it: a maximum's gradient is read where it was taken from."""
    pool = getattr(layer, "max_pool", 1)
    if pool == 1:
        return call
    x, taken = F.max_pool2d(call.x, pool, return_indices=True)
    grad_x = call.grad_x
    if grad_x is not None:
        grad_x = grad_x.flatten(2).gather(2, taken.flatten(2)).view(x.shape)
        require(grad_x.count_nonzero() == call.grad_x.count_nonzero(), "a gradient where nothing was taken from")
    return replace(call, x=x, grad_x=grad_x)


def _winner_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The units that compete, a row each."""
    if isinstance(layer, sk.KWinners2d):
        return x.movedim(1, -1).reshape(-1, layer.channels) if layer.local else x.flatten(1)
    return x.reshape(-1, x.shape[-1])


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _same(t: Tensor) -> Tensor:
    return t.clone()


def _is_nonzero(t: Tensor) -> Tensor:
    return (t != 0).double()


def require(condition, message: str) -> None:
    if not condition:
        raise WrongResult(f"k-winners: {message}")


def _compare(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest error."""
    if got.shape != exact.shape:
        raise WrongResult(f"{name}: wants shape {tuple(exact.shape)}, got {tuple(got.shape)}")
    error = (got.double() - exact).abs()
    within = error <= bound  # False for NaN
    if not within.all():
        worst = int(torch.where(within, -1, (error - bound).nan_to_num(torch.inf)).argmax())
        raise WrongResult(
            f"{name}: {int((~within).sum())} of {got.numel()} values are wrong, the worst {got.flatten()[worst]:.6g} for "
            f"{exact.flatten()[worst]:.6g}, allowed {bound.flatten()[worst]:.2g}"
        )
    return float(error.max()) if got.numel() else 0.0
