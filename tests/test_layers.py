"""The layers, hand-worked: small cases whose results can be read off."""

import pytest
import torch
from torch import nn

import sparsekern as sk


def test_k_winners_keeps_the_largest_and_breaks_ties_by_index():
    x = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0], [float("nan"), 5.0, float("inf"), -1.0]])
    y = sk.functional.k_winners(x, 2)
    assert y[0].tolist() == [0, 3, 3, 0]
    assert torch.isnan(y[2, 0])
    assert y[2, 2] == float("inf")
    assert sk.functional.k_winners(x, 1)[0].tolist() == [0, 3, 0, 0]


def test_boosting_prefers_those_that_seldom_win():
    x, duty_cycle = torch.tensor([[1.0, 1.1]]), torch.tensor([0.0, 1.0])
    assert sk.functional.k_winners(x, 1, duty_cycle, boost_strength=0.0)[0].tolist() == pytest.approx([0, 1.1])
    assert sk.functional.k_winners(x, 1, duty_cycle, boost_strength=1.0)[0].tolist() == [1, 0]


def test_duty_cycle_follows_equation_6():
    layer = sk.KWinners(4, k=1, duty_cycle_period=10, boost_strength=0.0)
    x = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    layer(x)  # T = 2 rows: the rate itself
    assert layer.duty_cycle.tolist() == [0.5, 0, 0.5, 0]
    layer(x[:1])  # T = 3, B = 1
    assert layer.duty_cycle.tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert layer.samples_seen == 3
    layer.eval()(x)
    assert layer.samples_seen == 3


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_sparse_linear_equals_its_dense_layer(group_size):
    torch.manual_seed(0)
    layer = sk.SparseLinear(40, 33, density=0.25, group_size=group_size)
    dense = layer.to_dense()
    x = torch.randn(5, 2, 40, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, dense(x))
    (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted)
    y.square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.densify(layer.weight.grad), dense.weight.grad * layer.mask)
    assert (layer.mask.sum(1) == 10).all()


def test_sparse_conv2d_equals_conv2d():
    torch.manual_seed(0)
    layer = sk.SparseConv2d(3, 8, 5, padding=2, stride=2)
    dense = layer.to_dense()
    x = torch.randn(2, 3, 9, 9).relu()
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.state_dict().keys() == nn.Conv2d(3, 8, 5).state_dict().keys()


def test_sparsify_and_back():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    swapped = sk.sparsify_(model, density=0.5, skip=["2"])
    assert list(swapped) == ["0"]
    assert isinstance(model[0], sk.SparseLinear)
    x = torch.randn(3, 16)
    y = model(x)
    assert list(sk.densify_(model)) == ["0"]
    torch.testing.assert_close(model(x), y)


def test_all_units_by_density_are_a_relu():
    x = torch.randn(2, 10, 3, 3)
    for layer in (sk.KWinners2d(10, density=0.99, local=True), sk.KWinners2d(10, 10, local=True)):
        assert torch.equal(layer(x), x.relu())
    assert torch.equal(sk.KWinners(10, density=0.99)(x.movedim(1, -1)), x.relu().movedim(1, -1))


def test_no_entropy_above_the_largest():
    layer = sk.KWinners2d(15, density=0.1, local=True, boost_strength=5.0)  # 2 winners of 15
    for _ in range(20):
        layer(torch.randn(64, 15, 4, 4))
    assert 0.9 * layer.max_entropy() < layer.entropy() <= layer.max_entropy()


@pytest.mark.parametrize("functions", [sk.functional, sk.reference], ids=["kernels", "reference"])
def test_boosts_beyond_float32_rank_as_the_largest(functions):
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert functions.k_winners(x, 2, torch.zeros(4), 200.0).tolist() == [[0, 0, 2, 3]]
    low = torch.tensor([[-float("inf"), -1.0, -2.0, -3.0]])
    assert functions.k_winners(low, 2, torch.ones(4), 500.0).tolist() == [[0, -1, -2, 0]]
