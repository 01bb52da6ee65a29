"""torch.func: vmap, grad, both at once, Jacobians; and second derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import sparsekern as sk

# vmap goes through PyTorch's fallback, one sample at a time, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


FUNCTIONS = {
    "k_winners": (lambda x: sk.functional.k_winners(x, 3), (4, 10)),
    "k_winners2d": (lambda x: sk.functional.k_winners2d(x, 7), (2, 3, 3, 4)),
    "k_winners2d local": (lambda x: sk.functional.k_winners2d(x, 1, local=True), (2, 3, 3, 4)),
    "SparseLinear": (sk.SparseLinear(10, 6, density=0.4, group_size=4), (4, 10)),
    "SparseConv2d": (sk.SparseConv2d(3, 5, 3, padding=1), (2, 3, 4, 4)),
    "SparseConv2d of one image": (sk.SparseConv2d(3, 5, 3, stride=2), (3, 5, 5)),
}
REFERENCES = {
    "k_winners": lambda x: sk.reference.k_winners(x, 3),
    "k_winners2d": lambda x: sk.reference.k_winners2d(x, 7),
    "k_winners2d local": lambda x: sk.reference.k_winners2d(x, 1, local=True),
    **{name: f.to_dense() for name, (f, _) in FUNCTIONS.items() if isinstance(f, nn.Module)},
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    f, shape = FUNCTIONS[request.param]
    return f, REFERENCES[request.param], torch.randn(3, *shape)


@pytest.mark.parametrize("gradients", [True, False])
def test_vmap(function, gradients):
    f, reference, x = function
    with torch.set_grad_enabled(gradients):
        y = vmap(f)(x)
    torch.testing.assert_close(y, torch.stack([reference(sample) for sample in x]))
    inside = vmap(f, in_dims=1, out_dims=1)(x.transpose(0, 1))
    assert torch.equal(inside.transpose(0, 1), y)


def test_grad_and_vmap_of_it(function):
    f, reference, x = function

    def loss(of):
        return lambda sample: of(sample).pow(3).sum()

    wanted = torch.stack([grad(loss(reference))(sample) for sample in x])
    torch.testing.assert_close(torch.stack([grad(loss(f))(sample) for sample in x]), wanted)
    torch.testing.assert_close(vmap(grad(loss(f)))(x), wanted)


@pytest.mark.parametrize("strides", ["channels-last", "neither"])
def test_vmap_of_a_convolution_of_maps_that_are_not_contiguous(strides):
    """vmap cannot say whether a map is channels-last."""
    layer, x = sk.SparseConv2d(3, 5, 3, padding=1), torch.randn(4, 2, 3, 6, 5)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2) if strides == "channels-last" else x.transpose(-1, -2)
    wanted = torch.stack([layer(sample) for sample in x])
    torch.testing.assert_close(vmap(layer)(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), wanted)

    def gradient(sample):
        return grad(lambda x: layer(x).pow(3).sum())(sample)

    torch.testing.assert_close(vmap(gradient)(x), torch.stack([gradient(sample) for sample in x]))


@pytest.mark.parametrize("layer", [f for f, _ in FUNCTIONS.values() if isinstance(f, nn.Module)], ids=str)
def test_gradients_of_each_sample(layer):
    shape = (10,) if isinstance(layer, sk.SparseLinear) else (3, 5, 5)
    x = torch.randn(4, *shape)

    def loss(parameters, sample):
        return functional_call(layer, parameters, sample).square().sum()

    grads = vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sk.KWinners2d(4, 12),
        lambda: sk.KWinners2d(4, 12, max_pool=2),
        lambda: sk.KWinners2d(4, 12, max_pool=2, norm=nn.BatchNorm2d(4, affine=False)),
        lambda: nn.Sequential(sk.SparseConv2d(4, 4, 3), sk.KWinners2d(4, 12, max_pool=2)),
    ],
    ids=["plain", "pooled", "normalised", "behind a convolution"],
)
def test_vmap_of_channels_last_maps(make):
    layer = make().eval()
    x = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vmap(lambda sample: layer(sample[None])[0])(x), layer(x))


def test_boosting_under_vmap():
    x, duty_cycle = torch.randn(3, 2, 10), torch.rand(3, 10)
    y = vmap(lambda x, d: sk.functional.k_winners(x, 3, d, 2.0))(x, duty_cycle)
    wanted = [sk.reference.k_winners(x[i], 3, duty_cycle[i], 2.0) for i in range(3)]
    assert torch.equal(y, torch.stack(wanted))


def test_a_training_layer_under_vmap_sees_one_batch():
    layer, x = sk.KWinners(10, 3, boost_strength=2.0), torch.randn(6, 10)
    twin = copy.deepcopy(layer)
    for batch in (x, x.flip(1)):
        assert torch.equal(vmap(layer)(batch), twin(batch))
        assert torch.equal(layer.duty_cycle, twin.duty_cycle)
    assert layer.samples_seen == 12
    vmap(grad(lambda sample: layer(sample).sum()))(x)
    assert layer.samples_seen == 18


def test_an_ensemble():
    """Stacked parameters and buffers: each member has its support and its duty cycle."""
    members = [
        nn.Sequential(sk.KWinners(10, 3, boost_strength=2.0), sk.SparseLinear(10, 6, density=0.4)) for _ in range(3)
    ]
    for member in members:
        member(torch.randn(5, 10))
    parameters, buffers = stack_module_state(members)
    x = torch.randn(4, 10)
    y = vmap(lambda p, b: functional_call(members[0], (p, b), x))(parameters, buffers)
    for i, member in enumerate(members):
        torch.testing.assert_close(y[i], member(x))
        assert torch.equal(buffers["0.duty_cycle"][i], member[0].duty_cycle)
    assert buffers["0.samples_seen"].tolist() == [9, 9, 9]


def test_jacobian(function):
    f, reference, x = function
    torch.testing.assert_close(jacrev(f)(x[0]), jacrev(reference)(x[0]))


def test_forward_mode_is_refused():
    layer = sk.SparseLinear(10, 6, density=0.4)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(layer, (torch.randn(10),), (torch.randn(10),))


@pytest.mark.parametrize("sparse_input_grad", [False, True])
@pytest.mark.parametrize("group_size", [1, 4])
def test_second_derivatives_of_sparse_linear(group_size, sparse_input_grad):
    layer = sk.SparseLinear(7, 6, density=0.4, group_size=group_size, sparse_input_grad=sparse_input_grad).double()
    x = torch.randn(3, 7, dtype=torch.float64)
    if not sparse_input_grad:  # with it the gradient is that of the function elsewhere, not at zeros
        x[:, ::2] = 0
    names = [name for name, _ in layer.named_parameters()]

    def f(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    inputs = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_of_sparse_conv2d():
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    x[:, :, ::2] = 0
    inputs = [t.double().requires_grad_() for t in (x, torch.randn(3, 2, 3, 3), torch.randn(3))]
    assert torch.autograd.gradgradcheck(lambda *args: sk.functional.sparse_conv2d(*args, stride=2, padding=1), inputs)


def test_second_derivatives_of_k_winners():
    x = (torch.randperm(20).double() / 7).view(2, 10).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sk.functional.k_winners(x, 4), x)


def test_a_penalty_on_the_gradient_trains():
    """As in WGAN-GP: the gradient's norm is part of the loss, through every layer."""
    model = nn.Sequential(
        sk.SparseConv2d(1, 4, 3),
        nn.Softplus(),
        sk.KWinners2d(4, 30),
        nn.Flatten(),
        sk.SparseLinear(64, 16, density=0.5, group_size=4),
        nn.Softplus(),
        sk.KWinners(16, 5),
        sk.SparseLinear(16, 1, density=1.0),
    ).double()
    twin = copy.deepcopy(model)
    swapped = sk.densify_(twin)
    assert list(swapped) == ["0", "4", "7"]
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)

    def penalised(model):
        inputs = x.clone().requires_grad_()
        (grad_x,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        (grad_x.flatten(1).norm(dim=1) - 1).square().mean().backward()

    penalised(model)
    penalised(twin)
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)
    torch.testing.assert_close(model[4].densify(model[4].weight.grad), twin[4].weight.grad * model[4].mask)
    assert model[0].weight.grad.abs().max() > 0
