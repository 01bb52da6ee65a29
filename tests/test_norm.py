"""k-winners behind batch norm and max-pooling in one pass, against the three layers one after the other."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from tolerance import UNIT_ROUNDOFF, accumulator

FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPE, K, POOL = (4, 6, 8, 10), 17, 2


def pair(**options):
    """The layers one after the other, and the one layer, with states of their own."""
    norm = nn.BatchNorm2d(SHAPE[1], affine=False, **options)
    boosting = {"boost_strength": 1.5, "duty_cycle_period": 10}
    apart = nn.Sequential(copy.deepcopy(norm), nn.MaxPool2d(POOL), sk.KWinners2d(SHAPE[1], K, **boosting))
    return apart, sk.KWinners2d(SHAPE[1], K, norm=norm, max_pool=POOL, **boosting)


def allowed(dtype: torch.dtype) -> float:
    """For values and moments near 1: each channel's moments are sums of n terms in the accumulator's type, the gradient's
    two means likewise, and a handful of roundings follow; the constant covers both sides and values up to about 4."""
    n = SHAPE[0] * SHAPE[2] * SHAPE[3]
    return 16 * n * UNIT_ROUNDOFF[accumulator(dtype)] + 8 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.3}], ids=str
)
def test_same_as_three_layers(dtype, memory_format, options):
    torch.manual_seed(0)
    apart, one = (layer.to(dtype) for layer in pair(**options))
    close = {"rtol": 0, "atol": allowed(dtype)}
    for _ in range(3):
        x = (torch.randn(SHAPE, dtype=dtype) * torch.rand(SHAPE[1], 1, 1, dtype=dtype) + 0.5).to(
            memory_format=memory_format
        )
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [layer(x) for layer, x in zip((apart, one), xs, strict=True)]
        assert torch.equal(ys[1] != 0, ys[0] != 0)
        torch.testing.assert_close(ys[1], ys[0], **close)
        grad = torch.randn(ys[0].shape, dtype=dtype)
        for y in ys:
            y.backward(grad)
        torch.testing.assert_close(xs[1].grad, xs[0].grad, **close)
        assert xs[1].grad.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(one.duty_cycle, apart[2].duty_cycle, rtol=0, atol=0)
        for name, value in apart[0].state_dict().items():
            torch.testing.assert_close(one.norm.state_dict()[name], value, **close)
    apart.eval()
    one.eval()
    with torch.no_grad():
        torch.testing.assert_close(one(x), apart(x), **close)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, x in zip((apart, one), xs, strict=True):
        layer(x).square().sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=0, atol=16 * allowed(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_half_precision(dtype, memory_format):
    """The op against its plain body, which rounds where it does; the moments' own roundings may tip the last bit."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(dtype).to(memory_format=memory_format)
    ops, reference = torch.ops.sparsekern, sk.ops.k_winners_reference
    mean, variance = ops.channel_moments(x)
    for actual, wanted in zip((mean, variance), reference.channel_moments(x.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=allowed(torch.float32))
    args = (x, mean, torch.rsqrt(variance), K, torch.rand(SHAPE[1]), torch.tensor(1.0), POOL)
    actual, wanted = ops.norm_max_pool_k_winners2d(*args), reference.norm_max_pool_k_winners2d(*args)
    for a, w in zip(actual, wanted, strict=True):
        assert torch.equal(a, w)
    grad = torch.randn(actual[0].shape).to(dtype).to(memory_format=memory_format)
    args = (grad, *actual[:3], x, mean, torch.rsqrt(variance))
    a, w = ops.norm_max_pool_k_winners2d_backward(*args), reference.norm_max_pool_k_winners2d_backward(*args)
    torch.testing.assert_close(a, w, rtol=2 * UNIT_ROUNDOFF[dtype], atol=allowed(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("contiguous", [False, True])
def test_by_a_variance(dtype, memory_format, contiguous):
    """With eps the op forms the scale itself: a sum, a root and a quotient, each rounded once, as on the other side."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE).to(dtype).to(memory_format=memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    mean, variance, eps = torch.randn(SHAPE[1], dtype=wide), torch.rand(SHAPE[1], dtype=wide), 0.01
    choice = (K, torch.rand(SHAPE[1]), torch.tensor(1.0), POOL, contiguous)
    op = torch.ops.sparsekern.norm_max_pool_k_winners2d
    torch.library.opcheck(op, (x, mean, variance, *choice, eps))
    (y, *others), (wanted_y, *wanted) = (
        op(x, mean, variance, *choice, eps),
        op(x, mean, torch.rsqrt(variance + eps), *choice),
    )
    # Rounding the sum moves the root by half of that; root, quotient and product are rounded, too, on both sides.
    torch.testing.assert_close(y, wanted_y, rtol=2 * (3.5 * UNIT_ROUNDOFF[wide] + UNIT_ROUNDOFF[dtype]), atol=0)
    assert y.stride() == wanted_y.stride()
    assert all(torch.equal(*pair) for pair in zip(others, wanted, strict=True))


def test_other_norms_run_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    for norm in (nn.BatchNorm2d(SHAPE[1]), nn.GroupNorm(2, SHAPE[1]), nn.Identity()):
        one, apart = sk.KWinners2d(SHAPE[1], K, norm=norm, max_pool=POOL), sk.KWinners2d(SHAPE[1], K)
        wanted = apart(nn.functional.max_pool2d(copy.deepcopy(norm)(x), POOL))
        assert torch.equal(one(x), wanted)


def test_gradient_by_differences():
    torch.manual_seed(0)
    _, one = pair()
    one.double()
    one.duty_cycle.zero_()
    one.boost_strength = 0.0
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(one, x)


def test_no_second_derivative():
    torch.manual_seed(0)
    _, one = pair()
    x = torch.randn(SHAPE, requires_grad=True)
    (grad,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiles():
    torch.manual_seed(0)
    _, one = pair()
    other = copy.deepcopy(one)
    x = torch.randn(SHAPE)
    assert torch.equal(torch.compile(other, fullgraph=True, backend="aot_eager")(x), one(x))
    assert torch.equal(other.norm.running_var, one.norm.running_var)


@pytest.mark.parametrize("norm", [3, "batch", nn.BatchNorm2d], ids=str)
def test_refuses(norm):
    with pytest.raises(TypeError, match="wants a module or None for norm"):
        sk.KWinners2d(4, 2, norm=norm)


def test_one_value_a_channel_is_refused_as_batch_norm_refuses_it():
    layer = sk.KWinners2d(2, 1, norm=nn.BatchNorm2d(2, affine=False), max_pool=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 2, 1, 1))
    assert layer.samples_seen == 0
