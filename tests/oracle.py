"""The comparison with the float64 oracle that the tests of the linear and convolution ops share."""

import torch

from tolerance import assert_sums_close


def sparse_randn(*shape, active, dtype):
    """Normal numbers of which about a fraction ``active`` is not zero; the zeros are of both signs."""
    x = torch.randn(shape, dtype=torch.float64)
    return torch.where(torch.rand(shape) < active, x, torch.copysign(torch.zeros_like(x), x)).to(dtype)


def run(function, tensors, grad_y):
    """The result of function(**tensors) and the gradient of each tensor that is floating point, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if t is not None}
    y = function(**{name: leaves.get(name) for name in tensors})
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y.detach(), **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def compare(function, reference, tensors, grad_y, what=""):
    """Holds function's result and gradients against those of reference in float64, each within its tolerance.

    reference must be linear in each of the tensors: then the same function of absolute values gives each sum's magnitude,
    and of ones in the place of what is not zero the number of its terms. Returns function's results.
    """

    def mapped(change):
        return run(reference, {n: None if t is None else change(t) for n, t in tensors.items()}, change(grad_y))

    got = run(function, tensors, grad_y)
    exact = mapped(lambda t: t.double())
    magnitude = mapped(lambda t: t.double().abs())
    terms = mapped(lambda t: (t != 0).double())
    for name, wanted in exact.items():
        assert got[name].dtype == grad_y.dtype, f"{name}: {got[name].dtype}, wants {grad_y.dtype}"
        assert_sums_close(got[name], wanted, magnitude[name], terms[name], f"{name}, {what}")
    return got
