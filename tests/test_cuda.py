"""The Triton bodies on a GPU: values, real sizes, no synchronisation, graphs, two runs alike."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.ops import k_winners_reference, sparse_conv2d_reference, sparse_linear_reference
from tolerance import assert_same_bits, assert_sums_close

if not torch.cuda.is_available():
    pytest.skip("no GPU that PyTorch can use", allow_module_level=True)

from sparsekern.ops import sparse_conv2d_triton
from triton_dispatch_cases import network, train
from triton_k_winners_cases import *  # noqa: F403
from triton_sparse_conv2d_cases import *  # noqa: F403
from triton_sparse_linear_cases import *  # noqa: F403

ops = torch.ops.sparsekern
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def strict():
    """Sums in float32, always in the same order: no TF32, no partial sums in 16 bits, no float atomics of cuDNN's."""
    settings = [
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    ]
    before = [getattr(where, name) for where, name in settings]
    for where, name in settings:
        setattr(where, name, name == "deterministic")
    yield
    for (where, name), value in zip(settings, before, strict=True):
        setattr(where, name, value)


def randn(*shape, active=1.0, dtype=F32):
    x = torch.randn(shape, device="cuda")
    return torch.where(torch.rand(shape, device="cuda") < active, x, 0).to(dtype)


SELECTIONS = [
    (1024, 1000, 100, F32, True),
    (65536, 1024, 102, F32, False),
    (64, 4608, 400, F32, True),
    (64, 12544, 1200, BF16, True),
    (300, 16384, 64, torch.float16, False),
    (256, 131072, 64, F32, False),
    (3, 131071, 13107, F32, True),
    (2, 2**21, 64, BF16, False),
]


@pytest.mark.parametrize(("rows", "n", "k", "dtype", "boosted"), SELECTIONS, ids=str)
@pytest.mark.parametrize("values", ["normal", "ties", "mostly zero"])
def test_selections(values, rows, n, k, dtype, boosted):
    x = randn(rows, n, dtype=dtype, active=1e-4 if values == "mostly zero" else 1.0)
    x = x.round() if values == "ties" else x
    boost = (torch.rand(n, device="cuda"), torch.tensor(1.5, device="cuda")) if boosted else (None, None)
    got = ops.k_winners(x, k, *boost, n, 1)
    again = ops.k_winners(x, k, *boost, n, 1)
    part = slice(0, min(rows, 2**22 // n))
    wanted = k_winners_reference.k_winners(x[part], k, *boost, n, 1)
    assert_same_bits(got[1][part], wanted[1], "winners")
    assert_same_bits(got[0][part], wanted[0], "y")
    assert got[2][-1] == rows
    assert got[2][:-1].sum() == rows * k
    for a, b in zip(got, again, strict=True):
        assert_same_bits(a, b, "two runs")


def test_more_than_2_to_the_31_elements():
    n = 2048
    x = torch.randn(64, n, device="cuda").to(BF16).repeat(2**31 // n // 64 + 1, 1)
    y, winners, _ = ops.k_winners(x, 100, None, None, n, 1)
    wanted, bits, _ = k_winners_reference.k_winners(x[-64:], 100, None, None, n, 1)
    assert_same_bits(winners[-64:], bits, "winners")
    assert_same_bits(y[-64:], wanted, "y")
    assert_same_bits(ops.k_winners_backward(x, winners)[-64:], wanted, "gradient")


LINEARS = [
    *((B, 1600, 1000, 0.4, 1, 0.125, F32) for B in (1, 2, 31, 32, 33, 64, 1000)),
    *((B, 1600, 1500, 0.1, 16, 0.125, dtype) for B in (1, 64, 1000) for dtype in (F32, BF16)),
    (256, 4096, 2048, 0.1, 64, 1.0, BF16),
    (1, 14336, 4096, 1.0, 4096, 0.05, BF16),
    (100, 32768, 256, 1.0, 256, 0.001, BF16),
    (100, 32768, 256, 1.0, 256, 0.5, BF16),
    (100, 16384, 100, 1.0, 100, 0.001, F32),
]


@pytest.mark.parametrize(("B", "I", "O", "density", "G", "active", "dtype"), LINEARS, ids=str)
def test_linears(B, I, O, density, G, active, dtype):
    layer = sk.SparseLinear(I, O, density=density, group_size=G, sparse_input_grad=True, device="cuda", dtype=dtype)
    x, grad_y = randn(B, I, active=active, dtype=dtype).requires_grad_(), randn(B, O, dtype=dtype)
    leaves = (x, layer.weight, layer.bias)
    results = [(y := layer(x)).detach(), *torch.autograd.grad(y, leaves, grad_y)]
    again = [(y := layer(x)).detach(), *torch.autograd.grad(y, leaves, grad_y)]
    exact, magnitude, terms = (
        linear_in(change, layer, x.detach(), grad_y)
        for change in (lambda t: t.double(), lambda t: t.double().abs(), lambda t: (t != 0).double())
    )
    for name, *tensors in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), results, exact, magnitude, terms, strict=True
    ):
        assert_sums_close(*tensors, name)
    for a, b in zip(results, again, strict=True):
        assert_same_bits(a, b, "two runs")


@pytest.mark.parametrize(
    ("B", "I", "O", "density", "G", "active"),
    [(32, 1600, 1000, 0.4, 1, 0.125), (256, 1600, 1024, 0.1, 64, 0.5), (100, 32768, 256, 1.0, 256, 0.5)],
)
def test_linears_in_tf32(B, I, O, density, G, active):
    """Factors are cut to ten bits, if PyTorch's products may be: each product is off by 2^-9 of itself at most."""
    torch.backends.cuda.matmul.allow_tf32 = True
    layer = sk.SparseLinear(I, O, density=density, group_size=G, sparse_input_grad=True, device="cuda")
    x, grad_y = randn(B, I, active=active).requires_grad_(), randn(B, O)
    leaves = (x, layer.weight)
    results = [(y := layer(x)).detach(), *torch.autograd.grad(y, leaves, grad_y)]
    exact, magnitude = (
        linear_in(change, layer, x.detach(), grad_y) for change in (lambda t: t.double(), lambda t: t.double().abs())
    )
    for name, got, wanted, size in zip(("y", "grad_x", "grad_weight"), results, exact, magnitude, strict=False):
        assert ((got.double() - wanted).abs() <= 2**-8 * size).all(), name


def linear_in(change, layer, x, grad_y):
    """The layer's result and gradients by the reference, of changed tensors."""
    weight, bias, indices = (
        change(layer.weight.detach()),
        change(layer.bias.detach()),
        (layer.ccol_indices, layer.row_indices),
    )
    y = sparse_linear_reference.sparse_linear(change(x), weight, bias, *indices, layer.out_features)
    factors = change(grad_y), change(x), weight
    return y, *sparse_linear_reference.sparse_linear_backward(*factors, *indices, True, True, True, True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("active", "stride", "padding"), [(0.1, 1, 0), (0.03, 2, 2), (1.0, 1, 0)])
def test_convolutions(active, stride, padding, channels_last):
    """Enough products for the sparse way, which dense tensors must leave to the dense kernels."""
    size = (12 + 2 * padding - 3) // stride + 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight, bias = randn(512, 64, 12, 12, active=active), randn(96, 64, 3, 3), randn(96)
    grad_y = randn(512, 96, size, size, active=active).contiguous(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    where = [stride, stride], [padding, padding]
    assert sparse_conv2d_triton.way(x, weight.shape, [size, size], where[1]) == "sparse"

    def results(bodies, change=lambda t: t):
        x_, weight_, grad_y_ = change(x), change(weight), change(grad_y)
        results = {"y": bodies.sparse_conv2d(x_, weight_, change(bias), *where)}
        for at_nonzeros in (False, True):
            gradients = bodies.sparse_conv2d_backward(grad_y_, x_, weight_, *where, at_nonzeros, True, True, True)
            names = (f"{name} {at_nonzeros}" for name in ("grad_x", "grad_weight", "grad_bias"))
            results.update(zip(names, gradients, strict=True))
        return results

    got, again = results(ops), results(ops)
    exact, magnitude, terms = (
        results(sparse_conv2d_reference, change)
        for change in (lambda t: t.double(), lambda t: t.double().abs(), lambda t: (t != 0).double())
    )
    for name, value in got.items():
        assert_sums_close(value, exact[name], magnitude[name], terms[name], name)
        assert_same_bits(value, again[name], f"two runs, {name}")


def step(model, optimizer, x, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def on_gpu():
    model = network().cuda()
    x, labels = torch.randn(8, 1, 12, 12, device="cuda"), torch.arange(8, device="cuda")
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), x, labels


def test_a_training_as_on_cpu():
    ours = network()
    theirs = copy.deepcopy(ours).cuda()
    x, labels = torch.randn(3, 1, 12, 12), torch.arange(3)
    torch.testing.assert_close(
        train(theirs, x.cuda(), labels.cuda()).cpu(), train(ours, x, labels), rtol=1e-3, atol=1e-4
    )


def test_no_synchronisation():
    arguments = on_gpu()
    step(*arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_in_a_graph():
    model, optimizer, x, labels = on_gpu()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer, x, labels)
    torch.cuda.current_stream().wait_stream(side)
    eager = copy.deepcopy(model)
    other = torch.optim.SGD(eager.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, x, labels)
    for _ in range(3):
        graph.replay()
        assert_same_bits(loss, step(eager, other, x, labels), "loss")
    for a, b in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert_same_bits(a, b, "state")


def test_compiled_without_breaks():
    model, _, x, _ = on_gpu()
    model.eval()
    compiled = torch.compile(nn.Sequential(*model), fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_compiled_training():
    """Strides are part of a compiled graph: those of every op's results are as promised."""
    model, _, x, labels = on_gpu()
    model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for run, of in ((compiled, model), (twin, twin)):
        of.zero_grad()
        F.cross_entropy(run(x), labels).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [sk.SparseLinear(64, 48, density=0.5), sk.SparseConv2d(4, 6, 3)], ids=repr)
def test_autocast_of_gradients(layer, dtype):
    layer = copy.deepcopy(layer).cuda()
    x = randn(4, 64) if isinstance(layer, sk.SparseLinear) else randn(4, 4, 8, 8)
    with torch.autocast("cuda", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == F32
    assert layer.weight.grad.isfinite().all()


def test_autocast():
    layer, x = sk.SparseLinear(64, 48, density=0.5).cuda(), randn(4, 64)
    with torch.autocast("cuda", dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
