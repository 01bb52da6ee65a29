"""Layers and training through PyTorch's dispatcher to the Triton bodies: what test_triton_interpreter.py runs."""

import contextlib
import copy
import importlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from oracle import compare, sparse_randn
from sparsekern.ops import _library
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
