"""The sparse-input convolution: result and every gradient against the float64 oracle, in both memory formats."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from oracle import compare, run, sparse_randn
from sparsekern.ops._library import instruction_set
from tolerance import DTYPES, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_filled")
ops = torch.ops.sparsekern
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

# (B, C, H, W), filters, kernel, stride, padding, active fraction of the input.
SHAPES = [
    ((0, 3, 6, 7), 5, (3, 3), (1, 1), (0, 0), 0.5),
    ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), 1.0),
    ((3, 3, 6, 7), 17, (3, 3), (1, 1), (0, 0), 0.5),
    ((2, 16, 5, 5), 16, (5, 5), (1, 1), (0, 0), 0.3),
    ((2, 17, 7, 9), 33, (3, 5), (2, 1), (1, 2), 0.1),
    ((1, 31, 8, 8), 15, (2, 4), (3, 2), (0, 3), 0.2),
    ((3, 33, 4, 4), 31, (1, 1), (1, 1), (0, 0), 0.1),
    ((2, 15, 3, 3), 64, (5, 5), (1, 1), (2, 2), 1.0),
    ((5, 64, 6, 5), 65, (3, 3), (2, 2), (1, 1), 0.05),
    ((2, 1, 12, 12), 30, (5, 5), (1, 1), (0, 0), 1.0),
    ((2, 40, 7, 7), 20, (3, 3), (1, 1), (1, 1), 0.0),
    ((1, 8, 9, 30), 48, (7, 3), (1, 1), (3, 1), 0.15),
    ((2, 1, 5, 5), 1, (2, 4), (1, 2), (0, 0), 1.0),
]


def bound(function, stride, padding, sparse_input_grad=False):
    return functools.partial(function, stride=stride, padding=padding, sparse_input_grad=sparse_input_grad)


def out_shape(shape, filters, kernel, stride, padding):
    sizes = ((shape[2 + d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in (0, 1))
    return (shape[0], filters, *sizes)


def compare_case(x, weight, bias, stride, padding, grad_y, sparse_input_grad, what):
    function, reference = (
        bound(f, stride, padding, sparse_input_grad) for f in (sk.functional.sparse_conv2d, sk.reference.sparse_conv2d)
    )
    got = compare(function, reference, {"x": x, "weight": weight, "bias": bias}, grad_y, what)
    if sparse_input_grad:
        assert not got["grad_x"][x == 0].any(), f"gradient at zeros of x, {what}"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_result_and_gradients(memory_format, dtype):
    form = FORMATS[memory_format]
    for i, (shape, filters, kernel, stride, padding, active) in enumerate(SHAPES):
        for sparse_input_grad in (False, True):
            got = compare_case(
                sparse_randn(*shape, active=active, dtype=dtype).to(memory_format=form),
                torch.randn(filters, shape[1], *kernel).to(dtype).to(memory_format=form),
                torch.randn(filters).to(dtype) if i % 3 else None,
                stride,
                padding,
                sparse_randn(*out_shape(shape, filters, kernel, stride, padding), active=0.3, dtype=dtype),
                sparse_input_grad,
                f"{shape=} {filters=} {kernel=} {stride=} {padding=} {active=} {sparse_input_grad=}",
            )
            if shape[0] and shape[1] > 1:  # else both formats at once
                assert got["y"].is_contiguous(memory_format=form)


# The convolutions of the paper: MNIST's second, speech's second, and MNIST's first with its dense image.
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("channels", "size", "filters", "k"), [(64, 14, 64, 1200), (32, 12, 64, 400), (30, 12, 30, 400), (1, 28, 30, 784)]
)
def test_convolutions_of_the_papers_size(channels, size, filters, k, memory_format):
    for B, dtype in ((1, torch.float32), (8, torch.float32), (2, torch.bfloat16)):
        x = sk.reference.k_winners2d(torch.rand(B, channels, size, size) + 0.1, k).to(dtype)
        compare_case(
            x.to(memory_format=FORMATS[memory_format]),
            torch.randn(filters, channels, 5, 5).to(dtype),
            torch.randn(filters).to(dtype),
            1,
            0,
            sparse_randn(B, filters, size - 4, size - 4, active=0.1, dtype=dtype),
            True,
            f"{B=} {dtype}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_sums_of_small_integers_are_exact(memory_format, dtype):
    """No order of adding rounds, so the result is the exact sum rounded once to the dtype, bit for bit."""

    def integers(*shape):
        return torch.randint(-2, 3, shape).float()

    for shape, filters, active in (((3, 20, 9, 8), 33, 0.2), ((1, 64, 7, 7), 16, 0.1), ((2, 5, 6, 6), 64, 1.0)):
        x = torch.where(torch.rand(shape) < active, integers(*shape), torch.zeros(()))
        tensors = {"x": x, "weight": integers(filters, shape[1], 3, 3), "bias": integers(filters)}
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
        tensors["x"] = tensors["x"].to(memory_format=FORMATS[memory_format])
        grad_y = integers(*out_shape(shape, filters, (3, 3), (2, 1), (1, 1))).to(dtype)
        got = run(bound(sk.functional.sparse_conv2d, (2, 1), (1, 1)), tensors, grad_y)
        doubles = {name: t.double() for name, t in tensors.items()}
        exact = run(bound(sk.reference.sparse_conv2d, (2, 1), (1, 1)), doubles, grad_y.double())
        for name, wanted in exact.items():
            assert torch.equal(got[name], wanted.to(dtype)), f"{name}, {shape=} {filters=} {active=}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("active", "grad_active"), [(0.05, 0.5), (0.7, 0.02)])
def test_gradients_in_stretches_of_samples(threads, active, grad_active, memory_format, dtype):
    """Many samples are cut into stretches, whose sums are added up. Sums of small integers are exact."""
    threads(3)
    x = torch.where(torch.rand(150, 20, 7, 6) < active, torch.randint(1, 3, (150, 20, 7, 6)), 0)
    grad_y = torch.where(torch.rand(150, 35, 4, 6) < grad_active, torch.randint(-2, 3, (150, 35, 4, 6)), 0).to(dtype)
    tensors = {"x": x, "weight": torch.randint(-2, 3, (35, 20, 3, 3)), "bias": torch.zeros(35)}
    tensors = {
        name: t.to(dtype).to(memory_format=FORMATS[memory_format] if t.dim() == 4 else torch.preserve_format)
        for name, t in tensors.items()
    }
    got = run(bound(sk.functional.sparse_conv2d, (2, 1), (1, 1), True), tensors, grad_y)
    doubles = {name: t.double() for name, t in tensors.items()}
    exact = run(bound(sk.reference.sparse_conv2d, (2, 1), (1, 1), True), doubles, grad_y.double())
    for name, wanted in exact.items():
        assert torch.equal(got[name], wanted.to(dtype)), name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_samples_of_very_different_activity(memory_format):
    """All zero, one pixel, a dense patch, all active: in one batch."""
    x = torch.randn(6, 20, 8, 8)
    x[0] = x[3] = 0
    x[1] = torch.where(torch.arange(64).view(8, 8) == 37, x[1], torch.zeros(()))
    x[2, :, 3:] = 0
    x[4, 5:] = 0
    x = x.to(memory_format=FORMATS[memory_format])
    weight, bias = torch.randn(24, 20, 3, 3), torch.randn(24)
    grad_y = torch.randn(6, 24, 8, 8)
    grad_y[2] = grad_y[5, 3:] = 0
    for sparse_input_grad in (False, True):
        compare_case(x, weight, bias, 1, 1, grad_y, sparse_input_grad, f"{sparse_input_grad=}")


@pytest.mark.parametrize(
    ("kernel", "stride", "width"), [((1, 80), (1, 80), 320), ((1, 3), (1, 100), 320), ((1, 800), (1, 1), 1000)]
)
def test_kernels_and_strides_wider_than_a_plan_holds(kernel, stride, width):
    x = torch.relu(torch.randn(2, 4, 3, width))
    weight, bias = torch.randn(8, 4, *kernel), torch.randn(8)
    grad_y = torch.randn(out_shape(x.shape, 8, kernel, stride, (0, 0)))
    for sparse_input_grad in (False, True):
        compare_case(x, weight, bias, stride, 0, grad_y, sparse_input_grad, f"{kernel=} {stride=}")


@st.composite
def problems(draw):
    kernel, stride, padding = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 5), (1, 3), (0, 3))
    )
    B, C, filters = (draw(st.integers(low, high)) for low, high in ((0, 3), (1, 40), (1, 40)))
    H, W = (draw(st.integers(max(1, kernel[d] - 2 * padding[d]), 10)) for d in (0, 1))
    active = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    return (B, C, H, W), filters, kernel, stride, padding, active, draw(st.integers(0, 2**32))


@settings(deadline=None, max_examples=100)
@given(problems(), st.sampled_from(DTYPES), st.sampled_from(sorted(FORMATS)))
def test_any_problem(problem, dtype, memory_format):
    shape, filters, kernel, stride, padding, active, seed = problem
    torch.manual_seed(seed)
    compare_case(
        sparse_randn(*shape, active=active, dtype=dtype).to(memory_format=FORMATS[memory_format]),
        torch.randn(filters, shape[1], *kernel).to(dtype),
        torch.randn(filters).to(dtype) if seed % 2 else None,
        stride,
        padding,
        sparse_randn(*out_shape(shape, filters, kernel, stride, padding), active=0.5, dtype=dtype),
        seed % 3 == 0,
        f"{problem} {dtype} {memory_format}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("active", [0.0, 1.0])
def test_a_tap_that_only_meets_padding_has_no_gradient(active, memory_format, dtype):
    """A dense bfloat16 convolution may leave it unwritten: what freed memory held before."""
    x = sparse_randn(1, 2, 1, 1, active=active, dtype=dtype).to(memory_format=FORMATS[memory_format])
    for kernel, stride, padding in (((1, 2), (1, 2), (0, 1)), ((2, 2), (2, 2), (1, 1)), ((3, 3), (3, 3), (1, 1))):
        weight = torch.randn(1, 2, *kernel).to(dtype).requires_grad_()
        y = sk.functional.sparse_conv2d(x, weight, None, stride, padding)
        freed = [torch.full((n,), math.nan, dtype=dtype) for n in (2, 4, 8, 16, 32, 64, 128) * 20]
        del freed
        y.sum().backward()
        idle = torch.ones(kernel, dtype=torch.bool)
        idle[tuple(padding)] = False  # the tap at the only pixel
        assert (weight.grad[:, :, idle] == 0).all()
        assert torch.equal(weight.grad[0, :, padding[0], padding[1]], x[0, :, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_infinities_and_nan_reach_the_outputs(memory_format, dtype):
    """NaN is not taken for a zero, nor an infinity clipped; other samples are not touched."""
    weight = torch.rand(24, 20, 3, 3).to(dtype) + 1
    for value in (math.nan, math.inf, -math.inf):
        x = sparse_randn(3, 20, 8, 8, active=0.1, dtype=dtype).to(memory_format=FORMATS[memory_format])
        x[1, 7, 4, 4] = value
        y = sk.functional.sparse_conv2d(x, weight, None, 1, 1)
        reached = y[1, :, 3:6, 3:6]
        assert reached.isnan().all() if math.isnan(value) else (reached == value).all()
        assert y[[0, 2]].isfinite().all()


STRIDED = {
    "transposed": lambda: torch.randn(2, 6, 7, 9).transpose(2, 3),
    "every second": lambda: torch.randn(2, 12, 9, 14)[:, ::2, :, ::2],
    "expanded": lambda: torch.randn(1, 6, 9, 7).expand(2, 6, 9, 7),
    "offset by one": lambda: torch.randn(757)[1:].view(2, 6, 9, 7),
    "channels last, cut": lambda: torch.randn(2, 9, 9, 6).permute(0, 3, 1, 2)[:, :, :, :7],
    "no batch dimension": lambda: torch.randn(6, 9, 7),
    "empty batch": lambda: torch.randn(0, 6, 9, 7),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_layout(layout):
    x, weight = STRIDED[layout](), torch.randn(8, 6, 3, 3)
    dense = torch.nn.functional.conv2d(x, weight, padding=1)
    grad_y = torch.randn(dense.shape[:-2] + dense.shape[:-3:-1]).transpose(-1, -2)
    assert grad_y.shape == dense.shape
    compare_case(x, weight, torch.randn(8), 1, 1, grad_y, True, layout)
    compare_case(x, weight.to(memory_format=torch.channels_last), None, 1, 1, grad_y, False, layout)


def test_gradient_that_is_expanded():
    x, weight = torch.randn(2, 6, 9, 7, requires_grad=True), torch.randn(8, 6, 3, 3)
    (grad_x,) = torch.autograd.grad(sk.functional.sparse_conv2d(x, weight).sum(), x)
    grad_y = torch.ones(2, 8, 7, 5)
    wanted = run(bound(sk.functional.sparse_conv2d, 1, 0), {"x": x, "weight": weight}, grad_y)["grad_x"]
    assert_same_bits(grad_x, wanted, "expanded")


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "none"])
def test_only_the_gradients_that_are_asked_for(wanted):
    tensors = {"x": torch.randn(2, 6, 9, 7), "weight": torch.randn(8, 6, 3, 3), "bias": torch.randn(8)}
    everything = run(bound(sk.functional.sparse_conv2d, 1, 0), tensors, torch.ones(2, 8, 7, 5))
    if wanted != "none":
        tensors[wanted].requires_grad_()
    y = bound(sk.functional.sparse_conv2d, 1, 0)(**tensors)
    assert_same_bits(y.detach(), everything["y"], "y")
    assert y.requires_grad == (wanted != "none")
    if wanted != "none":
        y.backward(torch.ones(2, 8, 7, 5))
        assert_same_bits(tensors[wanted].grad, everything[f"grad_{wanted}"], wanted)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradcheck(memory_format):
    x = sparse_randn(2, 3, 5, 4, active=0.5, dtype=torch.float64).to(memory_format=FORMATS[memory_format])
    weight, bias = torch.randn(4, 3, 3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    function = bound(sk.functional.sparse_conv2d, (2, 1), (1, 0))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_density_drops_weights_and_their_gradients():
    layer = sk.SparseConv2d(6, 8, 3, density=0.2)
    assert layer.mask.flatten(1).sum(1).tolist() == [round(0.2 * 54)] * 8
    x = torch.randn(2, 6, 9, 7)
    assert_same_bits(layer(x), sk.functional.sparse_conv2d(x, layer.weight * layer.mask, layer.bias), "masked")
    layer(x).square().sum().backward()
    assert not layer.weight.grad[~layer.mask].any()
    assert layer.weight.grad[layer.mask].all()


@pytest.mark.skipif(instruction_set() != "avx512", reason="elsewhere other sizes and zeros decide")
def test_only_small_dense_inputs_go_by_pytorchs_own_node():
    def node(layer, B, active, memory_format=torch.contiguous_format):
        x = sparse_randn(B, 16, 12, 12, active=active, dtype=torch.float32).to(memory_format=memory_format)
        return type(layer(x.requires_grad_()).grad_fn).__name__

    ours = "EagerSparseConv2dFunctionBackward"
    layer = sk.SparseConv2d(16, 32, 3)
    assert node(layer, 8, 1.0) == "ConvolutionBackward0"
    assert node(layer, 8, 0.02) == ours
    assert node(layer, 256, 1.0) == ours  # what it saves would be nothing
    assert node(layer, 8, 1.0, torch.channels_last) == ours  # its gradient would have another format than the weight
    assert node(sk.SparseConv2d(16, 32, 3, sparse_input_grad=True), 8, 1.0) == ours
    assert node(layer.to(memory_format=torch.channels_last), 8, 1.0, torch.channels_last) == "ConvolutionBackward0"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("B", "active"), [(1, 0.1), (5, 0.1), (130, 0.02)]
)  # few enough for the kernels of any processor
def test_threads_do_not_change_a_bit(threads, B, active, memory_format):
    x = sparse_randn(B, 32, 12, 12, active=active, dtype=torch.float32).to(memory_format=FORMATS[memory_format])
    tensors = {"x": x, "weight": torch.randn(64, 32, 5, 5), "bias": torch.randn(64)}
    grad_y = sparse_randn(B, 64, 8, 8, active=active, dtype=torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run(bound(sk.functional.sparse_conv2d, 1, 0, True), tensors, grad_y))
    for result, (name, wanted) in itertools.product(results[1:], results[0].items()):
        assert_same_bits(result[name], wanted, name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_weights_that_change_behind_pytorchs_back_are_seen(memory_format):
    """Packed weights are kept between calls on few samples. Sums of small integers are exact."""
    layer = sk.SparseConv2d(32, 48, 3, bias=False).to(memory_format=FORMATS[memory_format]).eval()
    x = sparse_randn(1, 32, 9, 9, active=0.1, dtype=torch.float32).sign().to(memory_format=FORMATS[memory_format])
    stored = layer.weight.data
    stored.random_(-9, 9)
    changes = [
        lambda: None,
        lambda: stored[47, 31, 2, 2].add_(1),
        lambda: stored.neg_(),
        lambda: stored.neg_(),
        lambda: stored.copy_(stored.flip(0)),
        lambda: stored[::2].neg_(),
    ]
    version = layer.weight._version
    for number, change in enumerate(changes):
        change()
        for _ in range(2):
            assert torch.equal(layer(x), torch.conv2d(x, stored)), f"change {number}"
    assert layer.weight._version == version


def test_opcheck():
    weight, bias = torch.randn(8, 6, 3, 3), torch.randn(8)
    for B, memory_format in itertools.product((0, 2), FORMATS.values()):
        x = sparse_randn(B, 6, 9, 7, active=0.3, dtype=torch.float32).to(memory_format=memory_format)
        grad_y = torch.randn(B, 8, 5, 4).to(memory_format=memory_format)
        torch.library.opcheck(ops.sparse_conv2d.default, (x, weight, bias, [2, 2], [1, 1]))
        torch.library.opcheck(ops.sparse_conv2d.default, (x, weight, None, [2, 2], [1, 1]))
        for wanted, weights in itertools.product(itertools.product((False, True), repeat=3), FORMATS.values()):
            filters = weight.to(memory_format=weights)
            torch.library.opcheck(
                ops.sparse_conv2d_backward.default, (grad_y, x, filters, [2, 2], [1, 1], True, *wanted)
            )
