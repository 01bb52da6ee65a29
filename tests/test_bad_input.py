"""Bad input: an error that names the op, what it wants and what it got, before any work, with nothing changed."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk

FLOATS = "in float32, float64, bfloat16 or float16"


class NoWork(TorchDispatchMode):
    """Fails where an op of sparsekern returns (it may refuse), or one runs that changes a tensor or the generator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = func.tags
        assert torch.Tag.nondeterministic_seeded not in tags, f"{func} ran"
        assert not func._schema.is_mutable, f"{func} ran"
        result = func(*args, **(kwargs or {}))
        assert func.namespace != "sparsekern", f"{func} ran"
        return result


def refuses(error, message, call, *kept):
    """call() raises error with exactly this message, does no work and changes nothing of the modules kept."""
    before = copy.deepcopy([module.state_dict() for module in kept])
    layers = [list(module.modules()) for module in kept]
    generator = torch.get_rng_state()
    with pytest.raises(error) as caught, NoWork():
        call()
    assert str(caught.value) == message
    assert type(caught.value) is error
    assert torch.equal(torch.get_rng_state(), generator)
    assert [list(module.modules()) for module in kept] == layers
    for module, state in zip(kept, before, strict=True):
        for name, value in module.state_dict().items():
            assert value.is_meta or torch.equal(value, state[name]), name


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def meta(*shape):
    return x(*shape, device="meta")


K_WINNERS = [
    (TypeError, "wants a tensor for x, got list", ([1.0, 2.0], 1), {}),
    (TypeError, f"wants x {FLOATS}, got torch.int64", (x(2, 8, dtype=torch.int64), 1), {}),
    (TypeError, f"wants x {FLOATS}, got torch.bool", (x(2, 8, dtype=torch.bool), 1), {}),
    (TypeError, f"wants x {FLOATS}, got torch.complex64", (x(2, 8, dtype=torch.complex64), 1), {}),
    (ValueError, "wants x of shape (..., n), got a tensor without dimensions", (torch.tensor(1.0), 1), {}),
    (ValueError, "wants k in 0..8, got -1", (x(2, 8), -1), {}),
    (ValueError, "wants k in 0..8, got 9", (x(2, 8), 9), {}),
    (TypeError, "wants an integer k in 0..8, got 2.0", (x(2, 8), 2.0), {}),
    (TypeError, "wants an integer k in 0..8, got True", (x(2, 8), True), {}),
    (ValueError, "wants boost_strength finite and at least 0, got -1.0", (x(2, 8), 2, x(8), -1.0), {}),
    (ValueError, "wants boost_strength finite and at least 0, got nan", (x(2, 8), 2, x(8), float("nan")), {}),
    (ValueError, "wants boost_strength finite and at least 0, got inf", (x(2, 8), 2, x(8), float("inf")), {}),
    (TypeError, "wants a number for boost_strength, got '1'", (x(2, 8), 2, x(8), "1"), {}),
    (TypeError, "wants a tensor for duty_cycle, got list", (x(2, 8), 2, [0.0] * 8, 1.0), {}),
    (TypeError, "wants duty_cycle in float32, got torch.float64", (x(2, 8), 2, x(8).double(), 1.0), {}),
    (ValueError, "wants duty_cycle of shape (8,), got (7,)", (x(2, 8), 2, x(7), 1.0), {}),
    (ValueError, "wants duty_cycle of shape (8,), got (2, 8)", (x(2, 8), 2, x(2, 8), 1.0), {}),
    (
        ValueError,
        "wants all tensors on one device, got x on cpu and duty_cycle on meta",
        (x(2, 8), 2, meta(8), 1.0),
        {},
    ),
]
K_WINNERS_2D = [
    (TypeError, "wants a tensor for x, got NoneType", (None, 1), {}),
    (TypeError, f"wants x {FLOATS}, got torch.uint8", (x(2, 4, 3, 3, dtype=torch.uint8), 1), {}),
    (ValueError, "wants x of shape (B, C, H, W), got (4, 3, 3)", (x(4, 3, 3), 1), {}),
    (ValueError, "wants x of shape (B, C, H, W), got (1, 2, 4, 3, 3)", (x(1, 2, 4, 3, 3), 1), {}),
    (ValueError, "wants k in 0..36, got 37", (x(2, 4, 3, 3), 37), {}),
    (ValueError, "wants k in 0..4, got 5", (x(2, 4, 3, 3), 5), {"local": True}),
    (ValueError, "wants k in 0..4, got -1", (x(2, 4, 3, 3), -1), {"local": True}),
    (ValueError, "wants duty_cycle of shape (4,), got (36,)", (x(2, 4, 3, 3), 3, x(36), 1.0), {}),
    (TypeError, "wants duty_cycle in float32, got torch.bfloat16", (x(2, 4, 3, 3), 3, x(4).bfloat16(), 1.0), {}),
    (
        ValueError,
        "wants all tensors on one device, got x on meta and duty_cycle on cpu",
        (meta(2, 4, 3, 3), 3, x(4), 1.0),
        {},
    ),
    (ValueError, "wants boost_strength finite and at least 0, got -0.5", (x(2, 4, 3, 3), 3, x(4), -0.5), {}),
]


# Two inputs, six outputs, groups of 4: input 0 has both groups, input 1 the second.
def linear(**changed):
    arguments = {
        "x": x(3, 2),
        "weight": x(3, 4),
        "ccol_indices": torch.tensor([0, 2, 3], dtype=torch.int32),
        "row_indices": torch.tensor([0, 1, 1], dtype=torch.int32),
        "out_features": 6,
        "bias": x(6),
    }
    return (), {**arguments, **changed}


DEVICES = "wants all tensors on one device, got x on cpu and {} on meta"
SPARSE_LINEAR = [
    (TypeError, "wants a tensor for x, got float", *linear(x=1.0)),
    (TypeError, f"wants x {FLOATS}, got torch.int32", *linear(x=x(3, 2).int())),
    (TypeError, "wants a tensor for weight, got NoneType", *linear(weight=None)),
    (TypeError, f"wants weight {FLOATS}, got torch.int8", *linear(weight=x(3, 4, dtype=torch.int8))),
    (ValueError, "wants x of shape (..., 2), got (3, 3)", *linear(x=x(3, 3))),
    (ValueError, "wants x of shape (..., 2), got (2, 3)", *linear(x=x(2, 3))),
    (ValueError, "wants x of shape (..., 2), got ()", *linear(x=torch.tensor(1.0))),
    (ValueError, "wants weight of shape (3, group_size), got (2, 4)", *linear(weight=x(2, 4))),
    (ValueError, "wants weight of shape (3, group_size), got (3,)", *linear(weight=x(3))),
    (ValueError, "wants weight of shape (3, group_size), got (3, 0)", *linear(weight=x(3, 0))),
    (ValueError, "wants bias of shape (6,), got (8,)", *linear(bias=x(8))),
    (ValueError, "wants bias of shape (6,), got (1, 6)", *linear(bias=x(1, 6))),
    (TypeError, "wants a tensor for bias, got list", *linear(bias=[0.0] * 6)),
    (TypeError, "wants an integer out_features at least 1, got 6.0", *linear(out_features=6.0)),
    (ValueError, "wants out_features at least 1, got 0", *linear(out_features=0)),
    (TypeError, "wants a tensor for row_indices, got list", *linear(row_indices=[0, 1, 1])),
    (TypeError, "wants row_indices in int32, got torch.int64", *linear(row_indices=torch.tensor([0, 1, 1]))),
    (TypeError, "wants ccol_indices in int32, got torch.float32", *linear(ccol_indices=torch.tensor([0.0, 2.0, 3.0]))),
    (
        ValueError,
        "wants ccol_indices of one dimension, got shape (1, 3)",
        *linear(ccol_indices=torch.tensor([[0, 2, 3]], dtype=torch.int32)),
    ),
    (ValueError, "wants ccol_indices of at least 2 elements, got 0", *linear(ccol_indices=torch.tensor([]).int())),
    (
        ValueError,
        "wants row_indices of one dimension, got shape ()",
        *linear(row_indices=torch.tensor(0, dtype=torch.int32)),
    ),
    (TypeError, "wants weight in the dtype of x (torch.float32), got torch.float64", *linear(weight=x(3, 4).double())),
    (TypeError, "wants bias in the dtype of x (torch.float32), got torch.bfloat16", *linear(bias=x(6).bfloat16())),
    (TypeError, "wants bias in the dtype of x (torch.float32), got torch.int64", *linear(bias=x(6).long())),
    (ValueError, DEVICES.format("weight"), *linear(weight=meta(3, 4))),
    (ValueError, DEVICES.format("bias"), *linear(bias=meta(6))),
    (ValueError, DEVICES.format("row_indices"), *linear(row_indices=meta(3).int())),
    (ValueError, DEVICES.format("ccol_indices"), *linear(ccol_indices=meta(3).int())),
]


RANGE, ASCENDING = "wants row_indices in 0..1, got {}", "wants ccol_indices ascending from 0 to the number of blocks"
SPARSE_LINEAR += [
    (ValueError, RANGE.format("0..1000000"), *linear(row_indices=torch.tensor([0, 10**6, 1]).int())),
    (ValueError, RANGE.format("-1..1"), *linear(row_indices=torch.tensor([0, 1, -1]).int())),
    (ValueError, ASCENDING, *linear(ccol_indices=torch.tensor([0, 10**8, 3]).int())),
    (ValueError, ASCENDING, *linear(ccol_indices=torch.tensor([0, 2, 4]).int())),
    (ValueError, ASCENDING, *linear(ccol_indices=torch.tensor([1, 2, 3]).int())),
    (ValueError, "wants row_indices ascending within each input", *linear(row_indices=torch.tensor([1, 0, 1]).int())),
]


def conv(**changed):
    return (), {"x": x(2, 3, 6, 5), "weight": x(4, 3, 3, 2), "bias": x(4), **changed}


SPARSE_CONV2D = [
    (TypeError, "wants a tensor for x, got int", *conv(x=1)),
    (TypeError, f"wants x {FLOATS}, got torch.uint8", *conv(x=x(2, 3, 6, 5, dtype=torch.uint8))),
    (TypeError, f"wants weight {FLOATS}, got torch.int64", *conv(weight=x(4, 3, 3, 2).long())),
    (ValueError, "wants weight of shape (O, C, KH, KW), got (4, 3, 3)", *conv(weight=x(4, 3, 3))),
    (ValueError, "wants weight of shape (O, C, KH, KW), got (4, 3, 0, 3)", *conv(weight=x(4, 3, 0, 3))),
    (ValueError, "wants x of shape (B, 3, H, W), got (2, 4, 6, 5)", *conv(x=x(2, 4, 6, 5))),
    (ValueError, "wants x of shape (B, 3, H, W), got (6, 5)", *conv(x=x(6, 5))),
    (ValueError, "wants x of shape (B, 3, H, W), got (1, 2, 3, 6, 5)", *conv(x=x(1, 2, 3, 6, 5))),
    (
        ValueError,
        "wants a padded input of at least the kernel size (3, 2), got (2, 5) with padding (0, 0)",
        *conv(x=x(2, 3, 2, 5)),
    ),
    (
        ValueError,
        "wants a padded input of at least the kernel size (9, 2), got (6, 5) with padding (1, 0)",
        *conv(weight=x(4, 3, 9, 2), padding=(1, 0)),
    ),
    (ValueError, "wants bias of shape (4,), got (3,)", *conv(bias=x(3))),
    (TypeError, "wants a tensor for bias, got bool", *conv(bias=True)),
    (ValueError, "wants stride at least 1, got 0", *conv(stride=0)),
    (ValueError, "wants stride at least 1, got -1", *conv(stride=(1, -1))),
    (ValueError, "wants one or two integers for stride, got (1, 1, 1)", *conv(stride=(1, 1, 1))),
    (TypeError, "wants an integer stride at least 1, got 1.5", *conv(stride=1.5)),
    (TypeError, "wants an integer stride at least 1, got 2.0", *conv(stride=(2.0, 1))),
    (ValueError, "wants padding at least 0, got -1", *conv(padding=-1)),
    (TypeError, "wants an integer padding at least 0, got 'same'", *conv(padding="same")),
    (TypeError, "wants weight in the dtype of x (torch.float16), got torch.float32", *conv(x=x(2, 3, 6, 5).half())),
    (TypeError, "wants bias in the dtype of x (torch.float32), got torch.float64", *conv(bias=x(4).double())),
    (ValueError, DEVICES.format("weight"), *conv(weight=meta(4, 3, 3, 2))),
    (ValueError, DEVICES.format("bias"), *conv(bias=meta(4))),
]
CALLS = [
    (op, *case)
    for op, cases in {
        "k_winners": K_WINNERS,
        "k_winners2d": K_WINNERS_2D,
        "sparse_linear": SPARSE_LINEAR,
        "sparse_conv2d": SPARSE_CONV2D,
    }.items()
    for case in cases
]


@pytest.mark.parametrize("where", [sk.functional, sk.reference], ids=["functional", "reference"])
@pytest.mark.parametrize(("op", "error", "message", "args", "kwargs"), CALLS, ids=[f"{c[0]}: {c[2]}" for c in CALLS])
def test_functions(op, error, message, args, kwargs, where):
    refuses(error, f"{op}: {message}", lambda: getattr(where, op)(*args, **kwargs))


def test_indices_that_change_are_checked_again():
    arguments = linear()[1]
    sk.functional.sparse_linear(**arguments)
    sk.functional.sparse_linear(**arguments)
    arguments["ccol_indices"][1] = 10**8
    refuses(ValueError, f"sparse_linear: {ASCENDING}", lambda: sk.functional.sparse_linear(**arguments))
    arguments["ccol_indices"][1] = 2
    arguments["row_indices"][0] = 10**6
    refuses(
        ValueError, "sparse_linear: " + RANGE.format("1..1000000"), lambda: sk.functional.sparse_linear(**arguments)
    )
    arguments["row_indices"][0] = 0
    sk.functional.sparse_linear(**arguments)
    # Fewer outputs make fewer groups.
    fewer = arguments | {"out_features": 4, "bias": None}
    refuses(
        ValueError, "sparse_linear: wants row_indices in 0..0, got 0..1", lambda: sk.functional.sparse_linear(**fewer)
    )


def test_the_good_arguments_of_these_cases_are_good():
    """Else the cases above might fail for another reason than the one that each changes."""
    assert sk.functional.sparse_linear(**linear()[1]).tolist() == [[2, 2, 2, 2, 3, 3]] * 3
    assert sk.functional.sparse_conv2d(**conv()[1]).flatten().tolist() == [19] * (2 * 4 * 4 * 4)


def linear_layer(*args, **kwargs):
    return lambda: sk.SparseLinear(*args, **kwargs)


def conv_layer(*args, **kwargs):
    return lambda: sk.SparseConv2d(*args, **kwargs)


NEITHER = "wants exactly one of k and density, got k=None and density=None"
LAYERS = [
    (ValueError, f"KWinners: {NEITHER}", lambda: sk.KWinners(8)),
    (
        ValueError,
        "KWinners: wants exactly one of k and density, got k=2 and density=0.5",
        lambda: sk.KWinners(8, 2, density=0.5),
    ),
    (ValueError, "KWinners: wants n at least 1, got 0", lambda: sk.KWinners(0, 0)),
    (TypeError, "KWinners: wants an integer n at least 1, got '8'", lambda: sk.KWinners("8", 2)),
    (ValueError, "KWinners: wants k in 0..8, got 9", lambda: sk.KWinners(8, 9)),
    (ValueError, "KWinners: wants k in 0..8, got -1", lambda: sk.KWinners(8, -1)),
    (TypeError, "KWinners: wants an integer k in 0..8, got 0.5", lambda: sk.KWinners(8, 0.5)),
    (ValueError, "KWinners: wants density in (0, 1], got 0", lambda: sk.KWinners(8, density=0)),
    (ValueError, "KWinners: wants density in (0, 1], got 1.01", lambda: sk.KWinners(8, density=1.01)),
    (ValueError, "KWinners: wants density in (0, 1], got nan", lambda: sk.KWinners(8, density=float("nan"))),
    (TypeError, "KWinners: wants a number for density, got '10%'", lambda: sk.KWinners(8, density="10%")),
    (
        ValueError,
        "KWinners: wants k_inference_factor finite and at least 0, got -1",
        lambda: sk.KWinners(8, 2, k_inference_factor=-1),
    ),
    (
        ValueError,
        "KWinners: wants k_inference_factor finite and at least 0, got inf",
        lambda: sk.KWinners(8, 2, k_inference_factor=float("inf")),
    ),
    (
        ValueError,
        "KWinners: wants boost_strength finite and at least 0, got -1",
        lambda: sk.KWinners(8, 2, boost_strength=-1),
    ),
    (
        ValueError,
        "KWinners: wants boost_strength_factor finite and at least 0, got inf",
        lambda: sk.KWinners(8, 2, boost_strength_factor=float("inf")),
    ),
    (
        ValueError,
        "KWinners: wants duty_cycle_period at least 1, got 0",
        lambda: sk.KWinners(8, 2, duty_cycle_period=0),
    ),
    (ValueError, f"KWinners2d: {NEITHER}", lambda: sk.KWinners2d(4)),
    (ValueError, "KWinners2d: wants channels at least 1, got 0", lambda: sk.KWinners2d(0, 1)),
    (ValueError, "KWinners2d: wants k in 0..4, got 5", lambda: sk.KWinners2d(4, 5, local=True)),
    (ValueError, "KWinners2d: wants k at least 0, got -1", lambda: sk.KWinners2d(4, -1)),
    (ValueError, "KWinners2d: wants density in (0, 1], got -0.1", lambda: sk.KWinners2d(4, density=-0.1)),
    (ValueError, "KWinners2d: wants max_pool at least 1, got 0", lambda: sk.KWinners2d(4, 2, max_pool=0)),
    (ValueError, "SparseLinear: wants density in (0, 1], got 0.0", linear_layer(8, 4, density=0.0)),
    (ValueError, "SparseLinear: wants density in (0, 1], got 2", linear_layer(8, 4, density=2)),
    (TypeError, "SparseLinear: wants a number for density, got None", linear_layer(8, 4, density=None)),
    (ValueError, "SparseLinear: wants group_size at least 1, got 0", linear_layer(8, 4, density=0.5, group_size=0)),
    (
        TypeError,
        "SparseLinear: wants an integer group_size at least 1, got 1.0",
        linear_layer(8, 4, density=0.5, group_size=1.0),
    ),
    (ValueError, "SparseLinear: wants in_features at least 1, got 0", linear_layer(0, 4, density=0.5)),
    (ValueError, "SparseLinear: wants out_features at least 1, got -4", linear_layer(8, -4, density=0.5)),
    (
        TypeError,
        f"SparseLinear: wants dtype {FLOATS}, got torch.int64",
        linear_layer(8, 4, density=0.5, dtype=torch.int64),
    ),
    (ValueError, "SparseConv2d: wants in_channels at least 1, got 0", conv_layer(0, 4, 3)),
    (ValueError, "SparseConv2d: wants out_channels at least 1, got 0", conv_layer(3, 0, 3)),
    (ValueError, "SparseConv2d: wants kernel_size at least 1, got 0", conv_layer(3, 4, 0)),
    (ValueError, "SparseConv2d: wants one or two integers for kernel_size, got (3,)", conv_layer(3, 4, (3,))),
    (ValueError, "SparseConv2d: wants stride at least 1, got 0", conv_layer(3, 4, 3, stride=0)),
    (ValueError, "SparseConv2d: wants padding at least 0, got -1", conv_layer(3, 4, 3, padding=-1)),
    (
        ValueError,
        "SparseConv2d: wants 'valid', 'same' or integers for padding, got 'full'",
        conv_layer(3, 4, 3, padding="full"),
    ),
    (
        ValueError,
        "SparseConv2d: wants stride 1 and odd kernel sizes for padding='same', got stride (2, 2) and kernel_size (3, 3)",
        conv_layer(3, 4, 3, 2, "same"),
    ),
    (ValueError, "SparseConv2d: wants density in (0, 1], got 1.5", conv_layer(3, 4, 3, density=1.5)),
    (
        TypeError,
        f"SparseConv2d: wants dtype {FLOATS}, got torch.int32",
        conv_layer(3, 4, 3, dtype=torch.int32),
    ),
]


@pytest.mark.parametrize(("error", "message", "build"), LAYERS, ids=[case[1] for case in LAYERS])
def test_layers_that_cannot_be(error, message, build):
    refuses(error, message, build)


def k_winners_layer():
    layer = sk.KWinners(8, 3)
    layer(torch.randn(5, 8))
    return layer


def all_winners_layer():
    return sk.KWinners(8, 8)


def k_winners2d_layer(**kwargs):
    layer = sk.KWinners2d(4, 3, **kwargs)
    layer(torch.randn(5, 4, 3, 3))
    return layer


def pooled_layer():
    return k_winners2d_layer(max_pool=2)


def pooled_layer_elsewhere():
    return pooled_layer().to("meta")


LINEAR, CONV = sk.SparseLinear(8, 6, density=0.5, group_size=4), sk.SparseConv2d(3, 4, 3, density=0.5)
FORWARDS = [
    (ValueError, "KWinners: wants x of shape (..., 8), got (5, 7)", k_winners_layer, x(5, 7)),
    (ValueError, "KWinners: wants x of shape (..., 8), got ()", k_winners_layer, torch.tensor(1.0)),
    (TypeError, f"KWinners: wants x {FLOATS}, got torch.int64", k_winners_layer, x(5, 8).long()),
    (TypeError, f"KWinners: wants x {FLOATS}, got torch.int64", all_winners_layer, x(5, 8).long()),
    (TypeError, "KWinners: wants a tensor for x, got list", k_winners_layer, [1.0] * 8),
    (ValueError, "k_winners: wants all tensors on one device, got x on meta and duty_cycle on cpu", k_winners_layer,
     meta(5, 8)),
    (ValueError, "KWinners2d: wants x of shape (B, 4, H, W), got (5, 3, 4, 4)", k_winners2d_layer, x(5, 3, 4, 4)),
    (ValueError, "KWinners2d: wants x of shape (B, 4, H, W), got (4, 3, 3)", k_winners2d_layer, x(4, 3, 3)),
    (TypeError, f"KWinners2d: wants x {FLOATS}, got torch.bool", k_winners2d_layer, x(5, 4, 3, 3).bool()),
    (ValueError, "KWinners2d: wants k in 0..0 for x of shape (5, 4, 0, 3), got 3", k_winners2d_layer, x(5, 4, 0, 3)),
    (ValueError, "k_winners2d: wants all tensors on one device, got x on meta and duty_cycle on cpu",
     k_winners2d_layer, meta(5, 4, 3, 3)),
    (ValueError, "KWinners2d: wants H and W at least 2 (max_pool), got (5, 4, 1, 6)", pooled_layer, x(5, 4, 1, 6)),
    (TypeError, f"KWinners2d: wants x {FLOATS}, got torch.int16", pooled_layer, x(5, 4, 3, 3).short()),
    (ValueError, "k_winners2d: wants all tensors on one device, got x on cpu and duty_cycle on meta",
     pooled_layer_elsewhere, x(5, 4, 4, 4)),
    (ValueError, "sparse_linear: wants x of shape (..., 8), got (5, 6)", lambda: LINEAR, x(5, 6)),
    (TypeError, f"sparse_linear: wants x {FLOATS}, got torch.int64", lambda: LINEAR, x(5, 8).long()),
    (TypeError, "sparse_linear: wants weight in the dtype of x (torch.float64), got torch.float32", lambda: LINEAR,
     x(5, 8).double()),
    (ValueError, "sparse_linear: wants all tensors on one device, got x on meta and ccol_indices on cpu",
     lambda: LINEAR, meta(5, 8)),
    (ValueError, "sparse_conv2d: wants x of shape (B, 3, H, W), got (2, 4, 6, 6)", lambda: CONV, x(2, 4, 6, 6)),
    (TypeError, f"sparse_conv2d: wants x {FLOATS}, got torch.uint8", lambda: CONV, x(2, 3, 6, 6).byte()),
    (TypeError, "sparse_conv2d: wants weight in the dtype of x (torch.bfloat16), got torch.float32", lambda: CONV,
     x(2, 3, 6, 6).bfloat16()),
    (ValueError, "sparse_conv2d: wants all tensors on one device, got x on meta and weight on cpu", lambda: CONV,
     meta(2, 3, 6, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "build", "value"), FORWARDS, ids=[case[1] for case in FORWARDS])
def test_layers_refuse_an_input_and_keep_their_state(error, message, build, value):
    layer = build()
    refuses(error, message, lambda: layer(value), layer)
    layer.eval()
    refuses(error, message, lambda: layer(value), layer)


LAYOUTS = [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("change", LAYOUTS, ids=lambda change: change.__name__)
def test_an_input_of_another_layout(change, gradients):
    for layer, op, value in ((LINEAR, "sparse_linear", x(5, 8)), (CONV, "sparse_conv2d", x(2, 3, 6, 6))):
        if value.dim() == 4 and change is Tensor.to_sparse_csr:
            continue
        given = change(value)
        message = f"{op}: wants x as an ordinary (strided) tensor, got one of layout {given.layout}"
        with torch.set_grad_enabled(gradients):
            refuses(TypeError, message, lambda layer=layer, given=given: layer(given), layer)
            function = getattr(sk.functional, op)
            args = (given, layer.weight)
            args += (layer.ccol_indices, layer.row_indices, layer.out_features) if op == "sparse_linear" else ()
            refuses(TypeError, message, lambda function=function, args=args: function(*args))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", LAYOUTS, ids=lambda change: change.__name__)
def test_k_winners_of_another_layout(change):
    layer, given = sk.KWinners(8, 2), change(x(5, 8))
    message = f"KWinners: wants x as an ordinary (strided) tensor, got one of layout {given.layout}"
    refuses(TypeError, message, lambda: layer(given), layer)


def test_a_layer_without_a_map_to_choose_from():
    layer = sk.KWinners2d(4, 40)
    refuses(
        ValueError,
        "KWinners2d: wants k in 0..36 for x of shape (2, 4, 3, 3), got 40",
        lambda: layer(x(2, 4, 3, 3)),
        layer,
    )
    refuses(
        RuntimeError,
        "KWinners2d: max_entropy needs the size of the map: call the layer once, or give density",
        layer.max_entropy,
        layer,
    )


DENSE = nn.Linear(6, 4)
FROM_DENSE = [
    (ValueError, "wants exactly one of density and mask, got none", {}),
    (ValueError, "wants exactly one of density and mask, got both", {"density": 0.5, "mask": x(4, 6).bool()}),
    (ValueError, "wants density in (0, 1], got 0", {"density": 0}),
    (ValueError, "wants mask of shape (4, 6), got (6, 4)", {"mask": x(6, 4).bool()}),
    (ValueError, "wants mask of shape (4, 6), got (24,)", {"mask": x(24).bool()}),
    (TypeError, "wants a bool tensor for mask, got torch.uint8", {"mask": x(4, 6).byte()}),
    (TypeError, "wants a bool tensor for mask, got list", {"mask": [[True] * 6] * 4}),
    (ValueError, "wants mask with values, got it on the meta device", {"mask": meta(4, 6).bool()}),
    (ValueError, "wants group_size at least 1, got 0", {"density": 0.5, "group_size": 0}),
    (
        ValueError,
        "wants a mask whose rows are alike within each group of 4, got row 2 different from row 0",
        {"mask": torch.tensor([1, 1, 0, 1]).bool()[:, None].expand(4, 6), "group_size": 4},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments"), FROM_DENSE, ids=[case[1] for case in FROM_DENSE])
def test_from_dense(error, message, arguments):
    refuses(
        error,
        f"SparseLinear.from_dense: {message}",
        lambda: sk.SparseLinear.from_dense(DENSE, **arguments),
        DENSE,
    )


def test_from_dense_by_magnitudes_that_are_not_there():
    dense = nn.Linear(6, 4, device="meta")
    refuses(
        ValueError,
        "SparseLinear.from_dense: wants linear.weight with values, got it on the meta device",
        lambda: sk.SparseLinear.from_dense(dense, density=0.5),
    )


def test_densify_of_another_shape():
    message = "SparseLinear.densify: wants a tensor of shape (8, 4), got {}"
    refuses(ValueError, message.format("(6, 8)"), lambda: LINEAR.densify(x(6, 8)), LINEAR)
    refuses(TypeError, message.format("NoneType"), lambda: LINEAR.densify(LINEAR.weight.grad), LINEAR)
    refuses(TypeError, message.format("int"), lambda: LINEAR.densify(3), LINEAR)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "wants density in (0, 1], got 0", {"density": 0}),
        (ValueError, "wants group_size at least 1, got -1", {"density": 0.5, "group_size": -1}),
        (
            ValueError,
            "wants names of submodules in skip, got ['7'], which the model lacks",
            {"density": 0.5, "skip": ["7"]},
        ),
        *(
            (
                TypeError,
                f"wants names of submodules or a function for skip, got {skip}",
                {"density": 0.5, "skip": skip},
            )
            for skip in (None, 3, [0, "2"])
        ),
    ],
)
def test_sparsify(error, message, arguments):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    refuses(error, f"sparsify_: {message}", lambda: sk.sparsify_(model, **arguments), model)


@pytest.mark.parametrize("function", [sk.sparsify_, sk.densify_])
def test_what_is_no_model(function):
    arguments = {"density": 0.5} if function is sk.sparsify_ else {}
    message = f"{function.__name__}: wants an nn.Module, got Tensor"
    refuses(TypeError, message, lambda: function(x(3), **arguments))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("boost_strength", -1.0, ValueError, "boost_strength finite and at least 0, got -1.0"),
        ("boost_strength", float("nan"), ValueError, "boost_strength finite and at least 0, got nan"),
        ("boost_strength", torch.ones(2), ValueError, r"boost_strength of shape \(\), got \(2,\)"),
        ("duty_cycle", torch.zeros(3), ValueError, r"duty_cycle of shape \(4,\), got \(3,\)"),
        ("samples_seen", 3, TypeError, "a tensor for samples_seen, got int"),
    ],
)
def test_k_winners_buffers(name, value, error, message):
    layer = sk.KWinners(4, 2)
    before = getattr(layer, name).clone()
    with pytest.raises(error, match=f"^KWinners: wants {message}"):
        setattr(layer, name, value)
    assert torch.equal(getattr(layer, name), before)


def test_a_norm_that_changes_the_map():
    with pytest.raises(ValueError, match=r"^KWinners2d: wants a norm that keeps the shape"):
        sk.KWinners2d(4, density=0.5, max_pool=2, norm=nn.AvgPool2d(2))(torch.randn(2, 4, 8, 8))


def test_the_bare_ops_refuse_buffers_of_another_dtype():
    ops, x, strength = torch.ops.sparsekern, torch.randn(2, 4), torch.ones(())
    for duty_cycle, boost in (
        (torch.zeros(4).double(), strength),
        (torch.zeros(3), strength),
        (torch.zeros(4), strength.double()),
    ):
        with pytest.raises(RuntimeError, match="wants duty_cycle"):
            ops.k_winners(x, 2, duty_cycle, boost, 4, 1)
    counts = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="wants duty_cycle"):
        ops.update_duty_cycle_(torch.zeros(4), torch.zeros((), dtype=torch.int32), counts, 10, 1, 1)
