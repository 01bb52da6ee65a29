"""Masks: how supports are drawn, stored, laid out and taken over."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.nn.mask import draw_supports, magnitude_mask, mask_to_indices, supports_to_indices
from sparsekern.ops.sparse_linear_reference import compress, densify


@st.composite
def sizes(draw):
    """in_features, groups, fan_in, with every relation of groups * fan_in to in_features."""
    in_features = draw(st.integers(1, 60))
    return in_features, draw(st.integers(1, 40)), draw(st.integers(1, in_features))


@settings(deadline=None, max_examples=200)
@given(sizes(), st.integers(0, 2**32))
def test_supports_have_their_fan_in_and_are_balanced(size, seed):
    in_features, groups, fan_in = size
    torch.manual_seed(seed)
    supports = draw_supports(*size)
    assert supports.shape == (groups, fan_in)
    assert all(len(set(row)) == fan_in for row in supports.tolist())
    used = torch.bincount(supports.flatten(), minlength=in_features)
    assert len(used) == in_features
    assert used.min() >= groups * fan_in // in_features
    assert used.max() <= -(-groups * fan_in // in_features)


def test_a_support_is_uniformly_random():
    """Every input, and every pair of neighbours, is as likely as any other, in the first group and in a later one."""
    in_features, groups, fan_in, draws = 10, 5, 4, 4000  # 20 cards of decks of 10: the third group straddles two
    inputs, pairs = torch.zeros(groups, in_features), torch.zeros(groups, in_features)
    for _ in range(draws):
        held = torch.zeros(groups, in_features).scatter_(1, draw_supports(in_features, groups, fan_in), 1)
        inputs += held
        pairs += held * held.roll(1, 1)
    one, two = fan_in / in_features, fan_in * (fan_in - 1) / (in_features * (in_features - 1))
    for counts, p in ((inputs, one), (pairs, two)):
        # Six standard deviations of a binomial count: 100 counts leave them once in 5 million runs.
        assert (counts - draws * p).abs().max() < 6 * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize("in_features", [1, 7, 64, 1000])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.25, 0.5, 0.999, 1.0, 1])
@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_every_output_has_exactly_its_fan_in(in_features, density, group_size):
    out_features = 37
    layer = sk.SparseLinear(in_features, out_features, density=density, group_size=group_size)
    fan_in = max(1, round(density * in_features))
    mask = layer.mask
    assert (mask.dtype, mask.shape) == (torch.bool, (out_features, in_features))
    assert (mask.sum(1) == fan_in).all()
    assert layer.fan_in == fan_in
    assert layer.density == pytest.approx(fan_in / in_features)
    assert layer.weight.shape == (fan_in * math.ceil(out_features / group_size), group_size)
    for first in range(0, out_features, group_size):
        assert (mask[first : first + group_size] == mask[first]).all()
    groups = mask[::group_size].sum(0)
    assert groups.max() - groups.min() <= 1


@pytest.mark.parametrize("density", [0.01, 0.3, 0.95])
def test_every_filter_has_exactly_its_fan_in(density):
    layer = sk.SparseConv2d(6, 10, (5, 3), density=density)
    assert (layer.mask.dtype, layer.mask.shape) == (torch.bool, (10, 6, 5, 3))
    assert (layer.mask.flatten(1).sum(1) == max(1, round(density * 90))).all()
    used = layer.mask.flatten(1).sum(0)
    assert used.max() - used.min() <= 1
    assert not layer.weight[~layer.mask].any()
    assert layer.weight[layer.mask].all()


BUILD = {
    "linear": lambda **kwargs: sk.SparseLinear(50, 30, density=0.2, **kwargs),
    "grouped linear": lambda **kwargs: sk.SparseLinear(50, 30, density=0.2, group_size=16, **kwargs),
    "convolution": lambda **kwargs: sk.SparseConv2d(5, 8, 3, density=0.2, **kwargs),
}


@pytest.mark.parametrize("name", BUILD)
def test_the_generator_decides(name):
    def built(seed, **kwargs):
        torch.manual_seed(seed)
        return BUILD[name](**kwargs)

    one, same, other = built(1), built(1), built(2)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
    assert not torch.equal(one.mask, other.mask)
    if name != "convolution":  # whose weights are drawn before its mask, and take more from the generator
        assert torch.equal(built(1, dtype=torch.float64).mask, one.mask)
    torch.manual_seed(1)
    other.reset_parameters()
    assert torch.equal(other.mask, one.mask)
    assert torch.equal(other.weight, one.weight)


@pytest.mark.parametrize("name", BUILD)
def test_existing_weights_start_as_the_dense_layers_do(name):
    """Uniform within 1 / sqrt(inputs), whatever the density."""
    torch.manual_seed(0)
    build = {
        "linear": lambda: sk.SparseLinear(400, 500, density=0.1),
        "grouped linear": lambda: sk.SparseLinear(400, 500, density=0.1, group_size=16),
        "convolution": lambda: sk.SparseConv2d(16, 500, 5, density=0.1),
    }[name]
    layer = build()
    weights, bound = (layer.densify(layer.weight) if hasattr(layer, "densify") else layer.weight)[layer.mask], 0.05
    assert len(weights) == 500 * 40
    for values in (weights.detach().double(), layer.bias.detach().double()):
        count = len(values)
        assert values.abs().max() <= bound
        # Mean 0 with variance bound^2 / 3; squares of mean bound^2 / 3 with variance bound^4 * 4 / 45. Six deviations.
        assert values.mean().abs() < 6 * bound / math.sqrt(3 * count)
        assert (values.square().mean() - bound**2 / 3).abs() < 6 * bound**2 * math.sqrt(4 / 45 / count)


@st.composite
def masks(draw):
    """A mask whose rows are alike in groups, of any pattern, and the group size."""
    group_size = draw(st.sampled_from([1, 2, 3, 16]))
    out_features, in_features = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.rand(-(-out_features // group_size), in_features) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    return rows.repeat_interleave(group_size, 0)[:out_features], group_size


@settings(deadline=None, max_examples=150)
@given(masks())
def test_indices_and_layout_are_inverse(problem):
    mask, group_size = problem
    out_features, in_features = mask.shape
    ccol_indices, row_indices = mask_to_indices(mask, group_size)
    assert (ccol_indices.dtype, row_indices.dtype) == (torch.int32, torch.int32)
    assert len(ccol_indices) == in_features + 1
    dense = torch.randn(mask.shape)
    packed = compress(dense, ccol_indices, row_indices, group_size)
    assert torch.equal(densify(packed, ccol_indices, row_indices, out_features), dense * mask)
    ones = torch.ones_like(packed, dtype=torch.bool)
    assert torch.equal(densify(ones, ccol_indices, row_indices, out_features), mask)
    # The same blocks as PyTorch's own layout of the padded matrix.
    padded = torch.nn.functional.pad(dense * mask, (0, 0, 0, -out_features % group_size))
    if mask.any():
        theirs = padded.to_sparse_bsc((group_size, 1))
        assert torch.equal(theirs.ccol_indices().int(), ccol_indices)
        assert torch.equal(theirs.row_indices().int(), row_indices)
        assert torch.equal(theirs.values().view_as(packed), packed)


@settings(deadline=None, max_examples=50)
@given(sizes(), st.integers(0, 2**32))
def test_supports_and_masks_are_stored_alike(size, seed):
    in_features, groups, _ = size
    torch.manual_seed(seed)
    supports = draw_supports(*size)
    mask = torch.zeros(groups, in_features, dtype=torch.bool).scatter_(1, supports, True)
    for one, other in zip(supports_to_indices(supports, in_features), mask_to_indices(mask, 1), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_densify_is_differentiable(group_size):
    layer = sk.SparseLinear(9, 20, density=0.4, group_size=group_size, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer.densify, layer.weight)
    grad = torch.randn(20, 9, dtype=torch.float64)
    (packed,) = torch.autograd.grad(layer.densify(layer.weight), layer.weight, grad)
    assert torch.equal(layer.densify(packed), grad * layer.mask)


def test_densify_lays_out_gradients_and_masks():
    layer = sk.SparseLinear(6, 5, density=0.5, group_size=2)
    layer(torch.eye(6)).backward(torch.arange(1.0, 31).view(6, 5))
    assert torch.equal(layer.densify(layer.weight.grad), torch.arange(1.0, 31).view(6, 5).t() * layer.mask)
    assert layer.densify(torch.ones_like(layer.weight, dtype=torch.int32)).dtype == torch.int32


def test_magnitudes_of_a_group_are_its_euclidean_norms():
    weight = torch.tensor([[3.0, 4.9, 0.0, 1.0], [4.0, 0.0, 4.8, -1.0], [-1.0, 0.5, 2.0, 0.0]])
    assert magnitude_mask(weight, 2, 1).tolist() == [
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, False],
    ]
    # Norms 5, 4.9, 4.8, 1.4 of the first group of two; the second has one row.
    assert magnitude_mask(weight, 2, 2).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, False, True, False],
    ]


def test_a_weight_that_exists_may_be_zero_and_come_back():
    layer = sk.SparseLinear(8, 4, density=0.5)
    mask = layer.mask.clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer.mask, mask)
    layer(torch.ones(3, 8)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(layer.densify(layer.weight) != 0, mask)
