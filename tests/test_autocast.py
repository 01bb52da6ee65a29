"""Mixed precision on CPU: float32 master weights under autocast, as the dense layers have it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk

DTYPES = [torch.bfloat16, torch.float16]


def autocast(dtype):
    return torch.autocast("cpu", dtype)


def assert_rounded(actual, exact, dtype):
    """actual is the float64 result on the same rounded inputs, but summed in float32 and rounded to dtype once.

    More near zero: plain PyTorch's float16 convolution, where it serves, rounds each sample's part of a gradient.
    """
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=4 * eps)


@pytest.fixture(params=["linear", "masked conv"])
def layer(request):
    if request.param == "linear":
        return sk.SparseLinear(40, 24, density=0.25, group_size=8), torch.randn(5, 40)
    return sk.SparseConv2d(3, 6, 3, padding=1, density=0.5), torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_compute_in_the_autocast_dtype_and_keep_float32_weights(layer, dtype):
    layer, x = layer
    exact = layer.to_dense().to(dtype).double()
    x_exact = x.to(dtype).double().requires_grad_()
    x.requires_grad_()
    with autocast(dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert_rounded(y, exact(x_exact), dtype)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact(x_exact).backward(grad.double())
    assert layer.weight.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == torch.float32
    grad_weight = layer.densify(layer.weight.grad) if isinstance(layer, sk.SparseLinear) else layer.weight.grad
    assert_rounded(grad_weight, exact.weight.grad * layer.mask, dtype)
    assert_rounded(layer.bias.grad, exact.bias.grad, dtype)
    assert_rounded(x.grad, x_exact.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_layer_on_cast_inputs_bit_for_bit(layer, dtype):
    layer, x = layer
    with autocast(dtype), torch.no_grad():
        y = layer(x)
    assert torch.equal(y, copy.deepcopy(layer).to(dtype)(x.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions(dtype):
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 5, 5)
    with autocast(dtype):
        y = sk.functional.sparse_conv2d(x, weight)
        assert y.dtype == dtype
        assert torch.equal(sk.functional.sparse_conv2d(x.to(dtype), weight), y)
        assert sk.reference.sparse_conv2d(x, weight).dtype == dtype
    assert_rounded(y, F.conv2d(x.to(dtype).double(), weight.to(dtype).double()), dtype)


def test_k_winners_takes_what_it_gets():
    layer = sk.KWinners(20, 5)
    with autocast(torch.bfloat16):
        assert layer(torch.randn(3, 20)).dtype == torch.float32
        assert layer(torch.randn(3, 20).bfloat16()).dtype == torch.bfloat16
    assert layer.duty_cycle.dtype == torch.float32
    assert layer.samples_seen == 6


def test_float64_is_left_alone(layer):
    layer, x = layer
    layer.double()
    with autocast(torch.bfloat16):
        y = layer(x.double())
    assert y.dtype == torch.float64
    assert torch.equal(y, layer(x.double()))


def test_float64_inputs_of_a_float32_layer_are_refused(layer):
    layer, x = layer
    with (
        autocast(torch.bfloat16),
        pytest.raises(TypeError, match=r"weight in the dtype of x \(torch.float64\)"),
    ):
        layer(x.double())


def test_outside_autocast_dtypes_must_agree(layer):
    layer, x = layer
    with pytest.raises(TypeError, match=r"wants weight in the dtype of x \(torch.bfloat16\), got torch.float32"):
        layer(x.bfloat16())
    with autocast(torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_trains(dtype):
    """Under autocast a network takes nearly the step that it takes in float32."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        sk.KWinners2d(4, 60),
        sk.SparseConv2d(4, 8, 3, sparse_input_grad=True),
        nn.Flatten(),
        sk.SparseLinear(128, 32, density=0.3, group_size=16),
        nn.ReLU(),
        sk.SparseLinear(32, 10, density=0.5, sparse_input_grad=True),
    )
    exact = copy.deepcopy(model)
    x, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    with autocast(dtype):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    F.cross_entropy(exact(x), labels).backward()
    assert loss.dtype == torch.float32
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert grad.dtype == torch.float32
    # Rounding moves some winners, so only the whole gradient's direction is comparable.
    assert F.cosine_similarity(grad, wanted, dim=0) > 0.98
