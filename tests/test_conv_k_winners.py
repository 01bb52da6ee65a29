"""k-winners behind convolution, batch norm and pooling in one pass, against the layers one after the other."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.ops import conv_k_winners_reference as reference
from tolerance import UNIT_ROUNDOFF

U = UNIT_ROUNDOFF[torch.float32]
BOOSTING = {"boost_strength": 1.5, "duty_cycle_period": 10}


def pair(filters=16, kernel=5, k=40, norm=False, bias=True, conv=nn.Conv2d, **options):
    """The layers one after the other, and the one layer, with states of their own."""
    first = conv(1, filters, kernel, bias=bias, **options)
    norms = [nn.BatchNorm2d(filters, affine=False)] if norm else []
    apart = nn.Sequential(first, *norms, nn.MaxPool2d(2), sk.KWinners2d(filters, k, **BOOSTING))
    first, *norms = copy.deepcopy([first, *norms])
    return apart, sk.KWinners2d(filters, k, conv=first, norm=norms[0] if norms else None, max_pool=2, **BOOSTING)


def rounded_(layers):
    """Weights of few bits: with inputs of few bits, sums are exact in any order."""
    with torch.no_grad():
        for p in layers.parameters():
            p.mul_(256).round_().div_(256)


def draw(*shape):
    return torch.randint(-20, 21, shape) / 8


def gradients(layer, x, grad_y):
    y = layer(x)
    return y, torch.autograd.grad(y, list(layer.parameters()), grad_y)


def terms(layer, x, grad_y):
    """A bound of the magnitudes that are summed for an element of the weight's gradient."""
    return float(grad_y.abs().sum() * x.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "filters", "kernel"),
    [((5, 1, 12, 15), 16, 5), ((3, 1, 9, 9), 48, (2, 3)), ((20, 1, 8, 20), 32, (1, 8))],
    ids=str,
)
def test_same_as_the_layers_apart(shape, filters, kernel, bias):
    torch.manual_seed(0)
    apart, one = pair(filters, kernel, bias=bias)
    rounded_(apart), rounded_(one)
    for _ in range(3):
        x = draw(*shape)
        grad_y = torch.randn(apart(x).shape)
        apart[-1].load_state_dict(one.state_dict(), strict=False)
        (ys, gs), (yo, go) = gradients(apart, x, grad_y), gradients(one, x, grad_y)
        assert yo.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(yo, ys)
        for a, b in zip(go, gs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=64 * U * terms(one, x, grad_y))
        torch.testing.assert_close(one.duty_cycle, apart[-1].duty_cycle, rtol=0, atol=0)
        assert one.samples_seen == apart[-1].samples_seen
    apart.eval(), one.eval()
    with torch.no_grad():
        assert torch.equal(one(x), apart(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_same_as_the_layers_apart_behind_batch_norm(offset, bias):
    """Its gradient reaches every place of the map, and here comes from the image's moments: against float64."""
    torch.manual_seed(1)
    apart, one = pair(32, 5, norm=True, bias=bias)
    wide = copy.deepcopy(apart).double()
    for _ in range(3):
        x = torch.randn(6, 1, 12, 13) + offset
        grad_y = torch.randn(6, 32, 4, 4)
        (ys, gs), (yo, go) = gradients(wide, x.double(), grad_y.double()), gradients(one, x, grad_y)
        _, gf = gradients(apart, x, grad_y)
        assert torch.equal(yo != 0, ys != 0)
        torch.testing.assert_close(yo, ys.float(), rtol=0, atol=1e-5)
        for a, b, f in zip(go, gs, gf, strict=True):
            # No further off than the layers apart in float32, but for a factor that luck accounts for.
            assert (a - b).abs().max() <= 2 * (f - b).abs().max() + 1e-6
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(one.norm, name), getattr(wide[1], name).float(), rtol=1e-5, atol=1e-6)
        assert one.norm.num_batches_tracked == wide[1].num_batches_tracked
    wide.eval(), one.eval()
    with torch.no_grad():
        torch.testing.assert_close(one(x), wide(x.double()).float(), rtol=0, atol=1e-5)
    y = one(x)  # with gradients: through the layers one after the other
    y.sum().backward()
    assert one.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "what",
    ["stride", "padding", "filters", "double", "x needs a gradient", "hook", "dilation", "mask", "local", "relu"],
)
def test_one_after_the_other_where_the_op_does_not_serve(what):
    torch.manual_seed(2)
    options = {"stride": {"stride": 2}, "padding": {"padding": 1}, "dilation": {"dilation": 2}}.get(what, {})
    filters = 6 if what == "filters" else 16
    conv = nn.Conv2d(1, filters, 3, **options)
    if what == "mask":
        conv = sk.SparseConv2d(1, filters, 3, density=0.5)
    calls = []
    if what == "hook":
        conv.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 1, 11, 12)
    k = filters * (5 * 5 if what == "relu" else 1) if what != "local" else 3
    k = {"relu": 16 * 4 * 5}.get(what, k)
    one = sk.KWinners2d(filters, k, conv=conv, max_pool=2, local=what == "local")
    if what == "double":
        one, x = one.double(), x.double()
    if what == "x needs a gradient":
        x.requires_grad_()
    apart = nn.Sequential(conv, nn.MaxPool2d(2), sk.KWinners2d(filters, k, local=what == "local"))
    assert torch.equal(one(x), apart(x))
    assert not calls or len(calls) == 2


def test_a_sparse_convolution_is_taken_too():
    torch.manual_seed(3)
    apart, one = pair(conv=sk.SparseConv2d)
    rounded_(apart), rounded_(one)
    x = draw(3, 1, 12, 12)
    assert torch.equal(one(x), apart(x))


def test_nan_and_ties_go_as_in_the_layers_apart():
    torch.manual_seed(4)
    apart, one = pair(k=30, kernel=1)
    with torch.no_grad():
        for conv in (apart[0], one.conv):
            conv.weight.fill_(1.0), conv.bias.zero_()  # all filters alike, exact values
    x = torch.randint(-2, 3, (4, 1, 8, 8)).float()
    x[0, 0, 3, 5] = torch.nan
    x[1, 0, 0, 0] = torch.inf
    torch.testing.assert_close(one(x), apart(x), rtol=0, atol=0, equal_nan=True)


def test_second_derivative():
    torch.manual_seed(5)
    apart, one = pair(k=10)
    x = torch.randn(2, 1, 8, 8)
    results = []
    for layer in (apart, one):
        weight = next(layer.parameters())
        (grad,) = torch.autograd.grad(layer(x).square().sum(), weight, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3 * float(results[0].abs().max()))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(norm, reentrant):
    torch.manual_seed(6)
    _, one = pair(norm=norm)
    other = copy.deepcopy(one)
    x = torch.randn(4, 1, 10, 10)
    grads = []
    for layer, run in ((one, lambda f, x: f(x)), (other, torch.utils.checkpoint.checkpoint)):
        options = {} if layer is one else {"use_reentrant": reentrant}
        head = nn.Parameter(torch.ones(()))
        y = run(lambda x, layer=layer, head=head: layer(x) * head, x, **options) if not reentrant else None
        if reentrant:  # wants an input with a gradient, so that the layers go one after the other
            y = run(lambda x, layer=layer: layer(x), x.clone().requires_grad_(), **options)
        y.square().sum().backward()
        grads.append(layer.conv.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    torch.testing.assert_close(other.duty_cycle, one.duty_cycle, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_threads_change_no_bit(norm):
    torch.manual_seed(7)
    _, one = pair(32, norm=norm, k=200)
    x, threads = torch.randn(33, 1, 20, 20), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            layer = copy.deepcopy(one)
            y = layer(x)
            y.square().sum().backward()
            results.append((y.detach(), layer.conv.weight.grad, layer.conv.bias.grad, layer.duty_cycle))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_compiles(norm):
    torch.manual_seed(8)
    _, one = pair(norm=norm)
    other = copy.deepcopy(one)
    x = torch.randn(4, 1, 10, 11)
    y = torch.compile(other, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, one(x))


def test_no_rows():
    _, one = pair()
    y = one(torch.randn(0, 1, 10, 10))
    assert y.shape == (0, 16, 3, 3)
    y.sum().backward()
    assert one.conv.weight.grad.abs().sum() == 0


def test_patch_moments_of_a_worked_case():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    wanted = torch.tensor([[10.0, 14.0, 4.0], [14.0, 20.0, 6.0], [4.0, 6.0, 2.0]])  # patches (1, 2) and (3, 4)
    for body in (torch.ops.sparsekern.patch_moments, reference.patch_moments):
        assert torch.equal(body(x, [1, 2]), wanted.double())


@pytest.mark.parametrize("kernel", [(5, 5), (1, 1), (3, 8), (4, 2)], ids=str)
def test_patch_moments(kernel):
    torch.manual_seed(9)
    x = torch.randn(7, 1, 9, 21)
    got, wanted = torch.ops.sparsekern.patch_moments(x, kernel), reference.patch_moments(x, kernel)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("filters", [16, 48, 64])
def test_offsets_change_nothing_else(filters):
    x, weight, bias = torch.randn(3, 1, 12, 11), torch.randn(filters, 1, 5, 4), torch.randn(filters)
    args = x, weight, bias, torch.rand(filters), torch.rand(filters), 40, torch.rand(filters), torch.tensor(1.5)
    with_offsets, without = (torch.ops.sparsekern.conv_max_pool_k_winners2d(*args, want) for want in (True, False))
    assert without[2].shape == (3, 0)
    for i in (0, 1, 3):
        assert torch.equal(with_offsets[i], without[i])


def test_refuses():
    with pytest.raises(TypeError, match="wants a module or None for conv"):
        sk.KWinners2d(16, 2, conv=3)
    with pytest.raises(ValueError, match=r"wants x of shape \(B, 16, H, W\)"):
        sk.KWinners2d(16, 2, conv=nn.Conv2d(1, 32, 3), max_pool=2)(torch.randn(2, 1, 8, 8))
    with pytest.raises(RuntimeError, match="16 n filters"):
        torch.ops.sparsekern.conv_max_pool_k_winners2d(
            torch.randn(2, 1, 8, 8), torch.randn(6, 1, 3, 3), None, None, None, 2, None, None
        )
