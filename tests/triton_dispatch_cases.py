"""Layers and training through PyTorch's dispatcher to the Triton bodies: what test_triton_interpreter.py runs."""

import contextlib
import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from oracle import compare, sparse_randn
from sparsekern.ops import _library, sparse_conv2d_triton
from tolerance import assert_same_bits

REFERENCES = [
    importlib.import_module(f"sparsekern.ops.{path.stem}")
    for path in sorted(Path(_library.__file__).parent.glob("*_reference.py"))
]


@contextlib.contextmanager
def registered_for_cpu(body_of):
    """The dispatcher takes body_of(reference) for each op on CPU."""
    library = torch.library.Library("sparsekern", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("sparsekern::"):
            op = schema.name.split("::")[1]
            (reference,) = (getattr(module, op) for module in REFERENCES if hasattr(module, op))
            library.impl(op, body_of(reference), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def network():
    return nn.Sequential(
        sk.SparseConv2d(1, 6, 3),
        sk.KWinners2d(6, 20, max_pool=2),
        sk.SparseConv2d(6, 8, 3, sparse_input_grad=True),
        sk.KWinners2d(8, 30),
        nn.Flatten(),
        sk.SparseLinear(8 * 9, 32, density=0.4, sparse_input_grad=True),
        sk.KWinners(32, 8),
        sk.SparseLinear(32, 40, density=0.25, group_size=16, sparse_input_grad=True),
        sk.KWinners(40, 8),
        nn.Linear(40, 10),
    )


def train(model, x, labels):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()(x)


def test_dispatch_of_a_training():
    """As with the plain bodies: the same winners throughout, and so nearly the same numbers."""
    ours = network()
    plain = copy.deepcopy(ours)
    x, labels = torch.randn(3, 1, 12, 12), torch.arange(3)
    with registered_for_cpu(_library.triton_body):
        y = train(ours, x, labels)
    with registered_for_cpu(lambda reference: reference):
        wanted = train(plain, x, labels)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert_same_bits(a, b, name)


def test_dispatch_of_gradients():
    layer = sk.SparseLinear(20, 17, density=0.3)

    def function(ops):
        return lambda x, weight, bias: ops.sparse_linear(x, weight, layer.ccol_indices, layer.row_indices, 17, bias)

    for B in (2, 40):
        x = sparse_randn(B, 20, active=0.4, dtype=torch.float32)
        tensors = {"x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
        with registered_for_cpu(_library.triton_body):
            compare(function(sk.functional), function(sk.reference), tensors, torch.randn(B, 17))


@contextlib.contextmanager
def bodies(which):
    with registered_for_cpu(_library.triton_body if which == "triton" else lambda reference: reference):
        yield


def last(t):
    return t.contiguous(memory_format=torch.channels_last)


STRIDED = {
    "KWinners of columns": (lambda: sk.KWinners(12, 3), lambda: torch.randn(12, 4).t()),
    "KWinners of sequences": (lambda: sk.KWinners(12, 3), lambda: torch.randn(3, 12, 2).mT),
    "KWinners of one row": (lambda: sk.KWinners(12, 3), lambda: torch.randn(12).expand(3, 12)),
    "KWinners2d": (lambda: sk.KWinners2d(3, 5), lambda: torch.randn(2, 4, 3, 5).transpose(1, 2)),
    "KWinners2d channels-last": (lambda: sk.KWinners2d(3, 5), lambda: last(torch.randn(2, 3, 4, 5))),
    "KWinners2d local": (lambda: sk.KWinners2d(3, 1, local=True), lambda: last(torch.randn(2, 3, 4, 5))),
    "SparseLinear": (lambda: sk.SparseLinear(12, 9, density=0.5), lambda: torch.randn(12, 4).t()),
    "SparseLinear of every other": (
        lambda: sk.SparseLinear(12, 9, density=0.5),
        lambda: torch.randn(2, 3, 24)[..., ::2],
    ),
    "SparseConv2d": (lambda: sk.SparseConv2d(3, 4, 3, padding=1), lambda: torch.randn(2, 5, 4, 6)[:, ::2]),
    "SparseConv2d channels-last": (lambda: sk.SparseConv2d(3, 4, 3, stride=2), lambda: last(torch.randn(2, 3, 5, 7))),
    "SparseConv2d of one channel": (lambda: sk.SparseConv2d(1, 4, 3), lambda: last(torch.randn(2, 1, 5, 7))),
}


@pytest.mark.parametrize("case", STRIDED)
@pytest.mark.parametrize("B", [None, 0])
def test_dispatch_of_strides_and_of_no_samples(case, B, monkeypatch):
    """Any strides, in the input and in the gradient, and no rows at all: as with the plain bodies."""
    monkeypatch.setattr(sparse_conv2d_triton, "strict_float32", lambda x: True)
    monkeypatch.setattr(sparse_conv2d_triton, "MIN_PRODUCTS", 0)
    make, inputs = STRIDED[case]
    layer, x = make(), inputs()[:B]
    results = []
    for which in ("triton", "plain"):
        run, leaf = copy.deepcopy(layer), x.detach().requires_grad_()
        with bodies(which):
            y = run(leaf)
            y.backward(torch.ones(y.shape[::-1]).permute(*reversed(range(y.dim()))))
        results.append({"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in run.named_parameters()})
        assert y.shape[0] == (0 if B == 0 else x.shape[0])
    for name, value in results[0].items():
        torch.testing.assert_close(
            value, results[1][name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def calls():
    """Of each op of which results have a memory format, arguments of both."""
    ops, formats = torch.ops.sparsekern, (torch.contiguous_format, torch.channels_last)
    x, weight = sparse_randn(2, 3, 6, 5, active=0.3, dtype=torch.float32), torch.randn(4, 3, 3, 2)
    for x_format in formats:
        image = x.contiguous(memory_format=x_format)
        for other in formats:
            filters, grad_y = (t.contiguous(memory_format=other) for t in (weight, torch.randn(2, 4, 4, 4)))
            where = [1, 1], [0, 0]
            yield ops.sparse_conv2d.default, (image, filters, None, *where)
            yield ops.sparse_conv2d_backward.default, (grad_y, image, filters, *where, True, True, True, True)
        yield ops.max_pool_k_winners2d.default, (image, 4, torch.rand(3), torch.tensor(1.0), 2)


@pytest.mark.parametrize("sparse", [True, False])
def test_dispatch_of_results_strides(sparse, monkeypatch):
    """What a compiled graph takes for granted of results: shapes, dtypes and strides as the fake kernels say."""
    monkeypatch.setattr(sparse_conv2d_triton, "strict_float32", lambda x: sparse)
    monkeypatch.setattr(sparse_conv2d_triton, "MIN_PRODUCTS", 0)
    with bodies("triton"):
        for op, arguments in calls():
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B", [2, 40])
def test_dispatch_under_autocast(B, dtype):
    layer = sk.SparseLinear(20, 17, density=0.3)
    x = sparse_randn(B, 20, active=0.4, dtype=torch.float32).requires_grad_()
    results = []
    for which in ("triton", "plain"):
        with bodies(which):
            with torch.autocast("cpu", dtype):
                y = layer(x)
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])))
    assert results[0][0].dtype == dtype
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got.float(), wanted.float(), rtol=5e-2, atol=5e-2)
