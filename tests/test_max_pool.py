"""k-winners of a max-pooled map in one pass: bit for bit what pooling and k-winners do one after the other."""

import pytest
import torch
from torch import nn

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def values(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape)
    if kind == "ties":
        return x.round()
    if kind == "nan":
        return torch.where(torch.rand(shape) < 0.05, float("nan"), x)
    if kind == "zeros":  # of both signs
        return torch.relu(x) * torch.where(torch.rand(shape) < 0.5, 1.0, -1.0)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "zeros"])
@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        ((3, 32, 24, 24), 2),
        ((2, 7, 9, 11), 2),
        ((2, 33, 10, 7), 3),
        ((1, 1, 4, 4), 2),
        ((2, 5, 2, 2), 2),
        ((0, 3, 8, 8), 2),
    ],
    ids=str,
)
def test_same_as_two_layers(dtype, memory_format, kind, shape, pool):
    torch.manual_seed(0)
    C, n = shape[1], shape[1] * (shape[2] // pool) * (shape[3] // pool)
    two = nn.Sequential(nn.MaxPool2d(pool), sk.KWinners2d(C, max(1, n // 10), boost_strength=1.5))
    one = sk.KWinners2d(C, max(1, n // 10), boost_strength=1.5, max_pool=pool)
    for _ in range(3):  # the duty cycle moves, and boosts
        x = values(kind, shape).to(dtype).to(memory_format=memory_format)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [layer(x) for layer, x in zip((two, one), xs, strict=True)]
        grad = torch.randn(ys[0].shape).to(dtype)
        for y in ys:
            y.backward(grad)
        torch.testing.assert_close(ys[1], ys[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=0, atol=0)
        assert torch.equal(one.duty_cycle, two[1].duty_cycle)
        assert one.samples_seen == two[1].samples_seen
        assert ys[1].is_contiguous(memory_format=memory_format) or x.numel() == 0
    two.eval()
    one.eval()
    assert torch.equal(torch.nan_to_num(one(x)), torch.nan_to_num(two(x)))


@pytest.mark.parametrize("options", [{"local": True}, {"density": 1.0}], ids=str)
def test_other_ways(options):
    """Local winners, and the plain ReLU of density 1, pool first."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    options = {"k": 3, **options} if "density" not in options else options
    one, two = sk.KWinners2d(8, max_pool=2, **options), sk.KWinners2d(8, **options)
    assert torch.equal(one(x), two(nn.functional.max_pool2d(x, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", FORMATS, ids=str)
@pytest.mark.parametrize("wanted", FORMATS, ids=str)
@pytest.mark.parametrize("options", [{"k": 37}, {"k": 3, "local": True}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("channels", "pool"), [(20, 1), (20, 2), (32, 2)])  # wins of 16 n channels are counted by lane
def test_memory_format(dtype, given, wanted, options, norm, channels, pool):
    """The same values, bits, gradients and duty cycles in the memory format that is asked for."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, 9, 10).to(dtype).to(memory_format=given)
    layers = [
        sk.KWinners2d(
            channels,
            **options,
            max_pool=pool,
            norm=nn.BatchNorm2d(channels, affine=False, dtype=dtype) if norm else None,
            memory_format=memory_format,
        )
        for memory_format in (None, wanted)
    ]
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    assert ys[1].is_contiguous(memory_format=wanted)
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(layers[0].duty_cycle, layers[1].duty_cycle)
    for grad_format in FORMATS:  # flattened in PyTorch's order, the gradient comes back contiguous
        grad_y = torch.randn(ys[0].shape).to(dtype).to(memory_format=grad_format)
        grads = [torch.autograd.grad(y, x, grad_y, retain_graph=True)[0] for y, x in zip(ys, xs, strict=True)]
        assert torch.equal(*grads)
        assert grads[1].count_nonzero() > 0


def test_gradcheck():
    torch.manual_seed(0)
    layer = sk.KWinners2d(3, 4, max_pool=2).double().eval()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck(memory_format, contiguous):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6).to(memory_format=memory_format).requires_grad_()
    args = (x, 7, torch.rand(5), torch.tensor(1.0), 2, contiguous)
    torch.library.opcheck(torch.ops.sparsekern.max_pool_k_winners2d, (args[0].detach(), *args[1:]))
    y, winners, offsets, _ = torch.ops.sparsekern.max_pool_k_winners2d(*args)
    channels_last = memory_format == torch.channels_last
    torch.library.opcheck(
        torch.ops.sparsekern.max_pool_k_winners2d_backward,
        (torch.randn_like(y).detach(), winners, offsets, 6, 6, channels_last),
    )


def test_compiles():
    torch.manual_seed(0)
    layer = sk.KWinners2d(4, 9, max_pool=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 8, 8)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    before = layer.duty_cycle.clone()
    eager = layer(xs[0])
    layer.duty_cycle.copy_(before)
    layer.samples_seen.zero_()
    traced = compiled(xs[1])
    assert torch.equal(traced, eager)
    for y in (eager, traced):
        y.square().sum().backward()
    assert torch.equal(xs[1].grad, xs[0].grad)


@pytest.mark.parametrize("max_pool", [0, -1, 1.5, True])
def test_refuses_windows(max_pool):
    with pytest.raises((ValueError, TypeError), match="max_pool"):
        sk.KWinners2d(4, 2, max_pool=max_pool)


@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.channels_last_3d, "channels_last"], ids=str)
def test_refuses_memory_formats(memory_format):
    with pytest.raises(TypeError, match="memory_format, got"):
        sk.KWinners2d(4, 2, memory_format=memory_format)


def test_refuses_small_maps():
    layer = sk.KWinners2d(4, 2, max_pool=4)
    with pytest.raises(ValueError, match="H and W at least 4"):
        layer(torch.randn(1, 4, 3, 8))
    assert layer.samples_seen == 0
