"""Input that is unusual but right: empty batches, any strides, extra dimensions, more than 2^31 elements."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

import sparsekern as sk
from tolerance import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled")
LAYERS = {
    "KWinners": (lambda: sk.KWinners(24, 5, boost_strength=1.5), (6, 24)),
    "KWinners2d": (lambda: sk.KWinners2d(4, 7), (6, 4, 3, 5)),
    "KWinners2d, pooled": (lambda: sk.KWinners2d(4, 3, max_pool=2), (6, 4, 3, 5)),
    "KWinners2d, local": (lambda: sk.KWinners2d(4, density=0.5, local=True), (6, 4, 3, 5)),
    "KWinners, all": (lambda: sk.KWinners(24, density=1.0), (6, 24)),
    "SparseLinear": (lambda: sk.SparseLinear(24, 10, density=0.5, group_size=4), (6, 24)),
    "SparseConv2d": (lambda: sk.SparseConv2d(4, 5, 3, padding=1, density=0.5, sparse_input_grad=True), (6, 4, 3, 5)),
}


def step(layer, x):
    """One training step on a copy of the layer: the output, every gradient and the state afterwards, by name."""
    layer = copy.deepcopy(layer)
    x = x.detach().requires_grad_()
    y = layer(x)
    grad_y = torch.arange(y.numel()).view(y.shape) % 7 - 3.0
    y.backward(grad_y)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(layer.named_buffers())}


def spaced(x):
    """The same values, two elements apart in every dimension."""
    room = torch.full([2 * size + 1 for size in x.shape], math.nan)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


LAYOUTS = {
    "two apart": spaced,
    "reversed order of dimensions": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(
        *reversed(range(x.dim()))
    ),
    "offset by one": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "part of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_any_strides_give_the_same_training_step(name, layout):
    build, shape = LAYERS[name]
    layer, x = build(), torch.randint(-3, 4, shape).float()  # whole numbers: ties among the winners, and exact sums
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    wanted, got = step(layer, x), step(layer, LAYOUTS[layout](x))
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", LAYERS)
def test_one_sample_for_all(name):
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(1, *shape[1:]).expand(shape)
    wanted, got = step(layer, x.contiguous()), step(layer, x)
    for key, value in wanted.items():
        assert_same_bits(got[key], value, key)


@pytest.mark.parametrize("name", ["KWinners", "KWinners, all", "SparseLinear"])
@pytest.mark.parametrize("batch", [(), (6,), (1, 6, 1), (2, 1, 3)])
def test_extra_batch_dimensions(name, batch):
    layer = LAYERS[name][0]()
    x = torch.randn(*batch, 24)
    wanted, got = step(layer, x.reshape(-1, 24)), step(layer, x)
    assert got["y"].shape == (*batch, *wanted["y"].shape[1:])
    for key, value in wanted.items():
        assert_same_bits(got[key].reshape(value.shape), value, key)


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_gives_zero_gradients_and_moves_nothing(name):
    build, shape = LAYERS[name]
    layer = build()
    layer(torch.randn(shape))
    before = copy.deepcopy(layer.state_dict())
    got = step(layer, torch.randn(0, *shape[1:]))
    assert got["x"].shape == (0, *shape[1:])
    assert got["y"].shape == (0, *layer(torch.randn(shape)).shape[1:])
    for key, buffer in layer.named_buffers():
        assert_same_bits(got[key], before[key], key)
        assert buffer.dtype == before[key].dtype
    for key, _ in layer.named_parameters():
        assert not got[key].any(), key


@pytest.mark.parametrize("batch", [(2, 0), (0, 3)])
def test_an_empty_batch_of_more_dimensions(batch):
    assert sk.KWinners(24, 5)(torch.randn(*batch, 24)).shape == (*batch, 24)
    assert sk.SparseLinear(24, 10, density=0.5)(torch.randn(*batch, 24)).shape == (*batch, 10)


def test_rows_without_an_order():
    """All equal, all -inf and all NaN: the lowest indices win, exactly k of them, in training and in eval mode."""
    rows = torch.tensor([0.0, -0.0, 2.5, -2.5, math.inf, -math.inf, math.nan])
    x = rows[:, None].expand(7, 24).clone()
    layer = sk.KWinners(24, 5, boost_strength=0.0)
    for k in (5, 8):  # 5 * 1.5, rounded half to even
        y = layer(x)
        assert_same_bits(y[:, :k], x[:, :k], "winners")
        assert_same_bits(y[:, k:], torch.zeros(7, 24 - k), "losers")
        layer.eval()


# More than 2^31 elements. What is never written costs no memory: NumPy's zeros are mapped, not filled.
ROWS, LENGTH = 2**21 + 3, 1024


def lazy_zeros(*shape):
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)


@pytest.fixture
def big(nan_filled):
    """No filling of outputs with NaN: here it would cost more than the test."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("big")
def test_k_winners_of_more_than_2_31_elements():
    x = lazy_zeros(ROWS, LENGTH)
    x[0, 5] = x[-1, -1] = x[-1, 17] = x[-2, 900] = 1
    y, winners, counts = torch.ops.sparsekern.k_winners(x, 2, None, None, LENGTH, 1)
    assert y[0, 5] == y[-1, 17] == y[-1, -1] == y[-2, 900] == 1
    assert int(y[-3:].count_nonzero()) == 3
    assert winners[-1].tolist() == [0, 0, 2, *[0] * 124, 128]
    # All other rows are zeros, of which the first two win, or the first beside the one that is not zero.
    assert counts[[0, 1, 5, 17, 900, 1023, 1024]].tolist() == [ROWS - 1, ROWS - 3, 1, 1, 1, 1, ROWS]


@pytest.mark.slow
@pytest.mark.usefixtures("big")
def test_sparse_linear_of_more_than_2_31_inputs_or_outputs():
    layer = sk.SparseLinear(LENGTH, 3, density=0.5, dtype=torch.bfloat16)
    x = lazy_zeros(ROWS, LENGTH)
    i = int(layer.mask.any(0).nonzero()[-1])
    x[-1, i] = 2
    with torch.no_grad():
        y = layer(x)
        dense = layer.densify(layer.weight)
    exact = layer.bias.double() + 2 * dense[:, i].double()
    assert_same_bits(y[-1], exact.bfloat16(), "last row")
    assert_same_bits(y[:-1], layer.bias.detach().expand(ROWS - 1, 3), "rows of zeros")
    y.fill_(0)
    y[-1] = torch.tensor([1.0, 0.0, 0.0])
    indices = layer.ccol_indices, layer.row_indices
    backward = functools.partial(
        torch.ops.sparsekern.sparse_linear_backward, y, x, layer.weight.detach(), *indices, False
    )
    grad_weight = backward(False, True, False)[1]
    wanted = torch.zeros(3, LENGTH, dtype=torch.bfloat16)
    wanted[0, i] = 2
    assert_same_bits(layer.densify(grad_weight), wanted * layer.mask, "grad_weight")
    grad_x = backward(True, False, False)[0]
    assert_same_bits(grad_x[-1], dense[0], "grad_x")
    assert not grad_x[-1000:-1].any()
    del grad_x
    wide = sk.SparseLinear(2, LENGTH, density=0.5, group_size=16, bias=False, dtype=torch.bfloat16)
    few = lazy_zeros(ROWS, 2)
    few[-1] = 1
    with torch.no_grad():
        y = wide(few)
        assert_same_bits(y[-1], wide.densify(wide.weight).sum(1), "last row")  # one weight each
    assert not y[-1000:-1].any()


@pytest.mark.slow
@pytest.mark.usefixtures("big")
def test_sparse_conv2d_of_more_than_2_31_inputs():
    B, C, size = 2**15 + 1, 64, 32
    weight, bias = torch.randn(2, C, 3, 3).bfloat16(), torch.randn(2).bfloat16()
    for form in ("contiguous", "channels last"):
        x = lazy_zeros(B, C, size, size) if form == "contiguous" else lazy_zeros(B, size, size, C).permute(0, 3, 1, 2)
        x[-1, -1, 30, 30] = 2
        y = torch.ops.sparsekern.sparse_conv2d(x, weight, bias, [10, 10], [0, 0])
        assert_same_bits(y[:-1], bias[:, None, None].expand(B - 1, 2, 3, 3), form)
        wanted = bias[:, None, None].expand(2, 3, 3).clone()
        assert_same_bits(y[-1], wanted, form)
        x[-1, -1, 22, 21] = 2
        y = torch.ops.sparsekern.sparse_conv2d(x, weight, bias, [10, 10], [0, 0])
        wanted[:, 2, 2] = (bias.double() + 2 * weight[:, -1, 2, 1].double()).bfloat16()
        assert_same_bits(y[-1], wanted, form)
