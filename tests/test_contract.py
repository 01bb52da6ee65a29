"""What holds for the package as a whole: one-way imports, bodies of one signature, and the layers' own promises."""

import ast
import copy
import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from oracle import compare, sparse_randn
from sparsekern.nn.mask import draw_supports, supports_to_indices
from sparsekern.ops import (
    conv_k_winners_reference,
    k_winners_reference,
    sparse_conv2d_reference,
    sparse_linear_reference,
)
from sparsekern.ops._library import triton_body
from tolerance import DTYPES, DUTY_CYCLE, assert_same_bits

PACKAGE = Path(sk.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
REFERENCES = (
    k_winners_reference,
    conv_k_winners_reference,
    sparse_linear_reference,
    sparse_conv2d_reference,
)
SCHEMAS = {schema.name: schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sparsekern::")}


def layer_of(module):
    """0 for the ops, 1 for the functions over them, 2 for the modules, 3 for whole models, 4 for the paper."""
    parts = module.split(".")[1:]
    if parts[:1] == ["ops"]:
        return 0
    if parts[:1] == ["nn"]:
        return 2
    if parts[:1] == ["paper"]:
        return 4
    return {"functional": 1, "reference": 1, "_C": 0, "sdr": 0}.get(parts[0], 3) if parts else 3


def imported(tree):
    """The modules of sparsekern that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsekern":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path = PACKAGE.joinpath(*whole.split(".")[1:])
                is_module = path.is_dir() or path.with_suffix(".py").exists() or alias.name == "_C"
                yield whole if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "sparsekern")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path):
    module = ".".join(("sparsekern", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for other in imported(ast.parse(path.read_text())):
        assert layer_of(other) <= layer_of(module), f"{module} imports {other}"
        if path.stem.endswith("_reference"):
            assert other.endswith("_reference"), f"the oracle {module} imports {other}"


def functions_of(path):
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def reference_of(op):
    (body,) = (getattr(module, op) for module in REFERENCES if hasattr(module, op))
    return body


def test_every_op_is_in_one_reference_file():
    assert {name.split("::")[1] for name in SCHEMAS} >= {"k_winners", "sparse_linear", "sparse_conv2d"}
    for name in SCHEMAS:
        assert callable(reference_of(name.split("::")[1]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_bodies_take_the_arguments_of_their_schema(name):
    """The plain PyTorch body and, where there is one, the Triton body; C++ bodies are boxed from the schema itself."""
    op, wanted = name.split("::")[1], [argument.name for argument in SCHEMAS[name].arguments]
    body = reference_of(op)
    assert list(inspect.signature(body).parameters) == wanted
    triton = Path(inspect.getfile(body).replace("_reference.py", "_triton.py"))
    if triton.exists() and op in functions_of(triton):
        assert [a.arg for a in functions_of(triton)[op].args.args] == wanted


@pytest.mark.parametrize("name", sk.functional.__all__)
def test_functional_and_reference_have_one_signature(name):
    assert sk.reference.__all__ == sk.functional.__all__
    one, other = (inspect.signature(getattr(where, name)) for where in (sk.functional, sk.reference))
    assert one == other


SIGNATURES = {
    "KWinners": "(n, k=None, *, density=None, k_inference_factor=1.5, boost_strength=1.0, boost_strength_factor=1.0,"
    " duty_cycle_period=1000)",
    "KWinners2d": "(channels, k=None, *, density=None, local=False, conv=None, norm=None, max_pool=1, memory_format=None,"
    " k_inference_factor=1.5, boost_strength=1.0, boost_strength_factor=1.0, duty_cycle_period=1000)",
    "SparseLinear": "(in_features, out_features, bias=True, *, density, group_size=1, sparse_input_grad=False,"
    " device=None, dtype=None)",
    "SparseConv2d": "(in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, *, density=1.0,"
    " sparse_input_grad=False, device=None, dtype=None)",
    "SparseLinear.from_dense": "(linear, *, density=None, mask=None, group_size=1, sparse_input_grad=False)",
    "functional.k_winners": "(x, k, duty_cycle=None, boost_strength=0.0)",
    "functional.k_winners2d": "(x, k, duty_cycle=None, boost_strength=0.0, local=False)",
    "functional.sparse_linear": "(x, weight, ccol_indices, row_indices, out_features, bias=None, *,"
    " sparse_input_grad=False)",
    "functional.sparse_conv2d": "(x, weight, bias=None, stride=1, padding=0, *, sparse_input_grad=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name):
    value = sk
    for part in name.split("."):
        value = getattr(value, part)
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def linear_arguments():
    indices = supports_to_indices(draw_supports(20, 3, 5), 20)
    return sparse_randn(4, 20, active=0.3, dtype=torch.float32), torch.randn(15, 8), indices, torch.randn(4, 24)


def samples():
    """For each op, arguments that torch.library.opcheck can run it with."""
    x, weight, (ccol, row), grad_y = linear_arguments()
    rows, duty_cycle = torch.randn(3, 20), torch.rand(20)
    _, winners, counts = k_winners_reference.k_winners(rows, 4, None, None, 20, 1)
    _, pooled_winners, offsets, _ = k_winners_reference.max_pool_k_winners2d(torch.randn(2, 3, 6, 5), 4, None, None, 2)
    image, filters = sparse_randn(2, 3, 6, 5, active=0.3, dtype=torch.float32), torch.randn(4, 3, 3, 2)
    grad_image = torch.randn(2, 4, 4, 4)
    gray, taps = torch.randn(2, 1, 6, 7), (torch.randn(16, 1, 3, 2), torch.randn(16))
    y, taken_winners, taken, _ = conv_k_winners_reference.conv_max_pool_k_winners2d(
        gray, *taps, None, None, 4, None, None
    )
    return {
        "k_winners": (rows, 4, duty_cycle, torch.tensor(1.0), 20, 1),
        "k_winners_backward": (rows, winners),
        "update_duty_cycle_": (duty_cycle, torch.tensor(5), counts, 1000, 1, 1),
        "max_pool_k_winners2d": (torch.randn(2, 3, 6, 5), 4, torch.rand(3), torch.tensor(1.0), 2),
        "max_pool_k_winners2d_backward": (torch.randn(2, 3, 3, 2), pooled_winners, offsets, 6, 5, False),
        "channel_moments": (image,),
        "norm_max_pool_k_winners2d": (image, torch.zeros(3), torch.ones(3), 4, torch.rand(3), torch.tensor(1.0), 2),
        "norm_max_pool_k_winners2d_backward": (
            torch.randn(2, 3, 3, 2),
            torch.randn(2, 3, 3, 2),
            pooled_winners,
            offsets,
            image,
            torch.zeros(3),
            torch.ones(3),
        ),
        "conv_max_pool_k_winners2d": (
            gray,
            *taps,
            torch.zeros(16),
            torch.ones(16),
            4,
            torch.rand(16),
            torch.tensor(1.0),
            False,
        ),
        "conv_max_pool_k_winners2d_grad_weight": (torch.randn_like(y), taken_winners, taken, gray, [3, 2]),
        "patch_moments": (gray, [3, 2]),
        "sparse_linear": (x, weight, torch.randn(24), ccol, row, 24),
        "sparse_linear_backward": (grad_y, x, weight, ccol, row, True, True, True, True),
        "sparse_conv2d": (image, filters, torch.randn(4), [1, 1], [0, 0]),
        "sparse_conv2d_backward": (grad_image, image, filters, [1, 1], [0, 0], True, True, True, True),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name):
    op = name.split("::")[1]
    torch.library.opcheck(getattr(torch.ops.sparsekern, op).default, samples()[op])


@pytest.mark.parametrize("name", SCHEMAS)
def test_plain_bodies_read_no_value(name):
    """They serve GPUs where no kernel does, where reading a value would wait for the device, and no graph be captured."""
    op = name.split("::")[1]
    reference_of(op)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in samples()[op]))


# The k-winners layers against Algorithm 1 and equation 6, step by step.


@st.composite
def trainings(draw):
    """A layer's settings and the batches of a few steps."""
    n = draw(st.integers(2, 40))
    strength = draw(st.sampled_from([0.0, 0.5, 1.5, 10.0]))
    settings_ = {
        "k": draw(st.integers(0, n - 1)),
        "boost_strength": strength,
        "boost_strength_factor": draw(st.sampled_from([0.0, 0.85, 1.0])),
        "duty_cycle_period": draw(st.sampled_from([1, 7, 1000])),
        "k_inference_factor": draw(st.sampled_from([0.0, 1.0, 1.5, 3.0])),
    }
    batches = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    return n, settings_, batches, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32))


def equation_6(duty_cycle, wins, rows, seen, period):
    window = max(rows, min(period, seen + rows))
    return [d * (1 - rows / window) + w / rows * (rows / window) for d, w in zip(duty_cycle, wins, strict=True)]


@settings(deadline=None, max_examples=120)
@given(trainings())
def test_k_winners_trains_as_the_paper_says(training):
    n, arguments, batches, dtype, seed = training
    torch.manual_seed(seed)
    layer, k, strength = sk.KWinners(n, **arguments), arguments["k"], arguments["boost_strength"]
    duty_cycle, seen = [0.0] * n, 0
    for step, rows in enumerate(batches):
        x = torch.randn(rows, n).to(dtype).requires_grad_()
        wanted = sk.reference.k_winners(x, k, layer.duty_cycle.clone(), strength)
        y = layer(x)
        assert_same_bits(y.detach(), wanted.detach(), "y")
        assert ((y != 0).sum(1) <= k).all()
        grad_y = torch.randn(rows, n).to(dtype)
        (grad,), (wanted_grad,) = (torch.autograd.grad(out, x, grad_y, retain_graph=True) for out in (y, wanted))
        assert_same_bits(grad, wanted_grad, "gradient")
        assert_same_bits(grad, torch.where(grad != 0, grad_y, torch.zeros_like(grad)), "gradient of winners")
        if rows:
            wins = (torch.autograd.grad(y, x, torch.ones_like(y))[0] != 0).sum(0).tolist()
            duty_cycle = equation_6(duty_cycle, wins, rows, seen, arguments["duty_cycle_period"])
        seen += rows
        torch.testing.assert_close(layer.duty_cycle, torch.tensor(duty_cycle), rtol=0, atol=(step + 1) * DUTY_CYCLE)
        assert layer.samples_seen == seen
        sk.step_boost_strength(layer)
        strength = float(torch.tensor(strength) * arguments["boost_strength_factor"])
        assert float(layer.boost_strength) == strength
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    x = torch.randn(5, n).to(dtype)
    k_inference = min(round(k * arguments["k_inference_factor"]), n)
    assert_same_bits(layer(x), sk.reference.k_winners(x, k_inference, layer.duty_cycle, strength), "eval")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@settings(deadline=None, max_examples=60)
@given(st.booleans(), st.booleans(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_k_winners2d_trains_as_the_paper_says(local, channels_last, C, H, W, seed):
    torch.manual_seed(seed)
    n = C if local else C * H * W
    k = seed % n  # 0..n - 1
    layer = sk.KWinners2d(C, k, local=local, duty_cycle_period=6, boost_strength=2.0)
    duty_cycle, seen = [0.0] * C, 0
    for step, B in enumerate((3, 5, 1)):
        x = torch.rand(B, C, H, W) + 0.1
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        wanted = sk.reference.k_winners2d(x, k, layer.duty_cycle.clone(), 2.0, local=local)
        y = layer(x)
        assert_same_bits(y, wanted, "y")
        assert y.stride() == x.stride() or min(C, H * W) == 1
        wins = (y != 0).sum((0, 2, 3)).double() / (H * W)
        assert float(wins.sum()) == pytest.approx(B * k / (1 if local else H * W))
        duty_cycle = equation_6(duty_cycle, wins.tolist(), B, seen, 6)
        seen += B
        torch.testing.assert_close(layer.duty_cycle, torch.tensor(duty_cycle), rtol=0, atol=(step + 1) * DUTY_CYCLE)
    layer.eval()
    wanted = sk.reference.k_winners2d(x, min(round(1.5 * k), n), layer.duty_cycle, 2.0, local=local)
    assert_same_bits(layer(x), wanted, "eval")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        sk.KWinners(12, 12),
        sk.KWinners(12, density=1.0),
        sk.KWinners2d(3, 12),
        sk.KWinners2d(3, density=1),
        sk.KWinners2d(3, 3, local=True),
    ],
    ids=repr,
)
def test_all_winners_is_relu(layer, training):
    layer.train(training)
    x = (torch.randn(4, 12) if isinstance(layer, sk.KWinners) else torch.randn(4, 3, 2, 2)).requires_grad_()
    y = layer(x)
    assert_same_bits(y.detach(), x.detach().relu(), "y")
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert_same_bits(grad, (x > 0).float(), "gradient")


def test_entropy_by_hand():
    layer = sk.KWinners(4, 1)
    layer.duty_cycle.copy_(torch.tensor([0.5, 0.25, 0.0, 1.0]))
    # H(1/2) = 1 bit, H(1/4) = 2 - 3/4 log2(3) bits, and none from what is certain.
    assert float(layer.entropy()) == pytest.approx(1 + 2 - 0.75 * math.log2(3), rel=1e-6)
    assert layer.max_entropy() == pytest.approx(4 * (2 - 0.75 * math.log2(3)))
    layer.duty_cycle.fill_(0.25)
    assert float(layer.entropy()) == pytest.approx(layer.max_entropy(), rel=1e-6)


# The layers with weights against the dense layers, in float64, each sum within its tolerance.


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 16]), st.sampled_from(DTYPES),
       st.floats(0.01, 1.0), st.integers(0, 2**32))  # fmt: skip
def test_sparse_linear_is_the_masked_dense_layer(I, O, group_size, dtype, density, seed):
    torch.manual_seed(seed)
    sparse_input_grad = seed % 2 == 0
    layer = sk.SparseLinear(
        I, O, seed % 3 > 0, density=density, group_size=group_size, sparse_input_grad=sparse_input_grad, dtype=dtype
    )
    x, grad_y = sparse_randn(5, I, active=0.4, dtype=dtype), sparse_randn(5, O, active=0.6, dtype=dtype)

    def sparse(x, weight, bias):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    def dense(x, weight, bias):
        x = torch.where(x != 0, x, x.detach()) if sparse_input_grad else x
        return torch.nn.functional.linear(x, layer.densify(weight), bias)

    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    compare(sparse, dense, tensors, grad_y, f"{I=} {O=} {group_size=} {density=}")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 2), st.sampled_from(DTYPES),
       st.floats(0.05, 1.0), st.integers(0, 2**32))  # fmt: skip
def test_sparse_conv2d_is_the_masked_dense_layer(C, O, kernel, stride, dtype, density, seed):
    torch.manual_seed(seed)
    padding = seed % 2
    layer = sk.SparseConv2d(C, O, kernel, stride, padding, seed % 3 > 0, density=density, dtype=dtype)
    x = sparse_randn(2, C, 6, 5, active=0.3, dtype=dtype)
    grad_y = torch.randn(layer(x).shape).to(dtype)
    mask = torch.ones_like(layer.weight) if layer.mask is None else layer.mask

    def sparse(x, weight, bias):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,))

    def dense(x, weight, bias):
        return torch.nn.functional.conv2d(x, weight * mask, bias, stride, padding)

    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    compare(sparse, dense, tensors, grad_y, f"{C=} {O=} {kernel=} {stride=} {padding=} {density=}")


GRADCHECKED = {
    "KWinners": (lambda: sk.KWinners(10, 3), (4, 10)),
    "KWinners2d": (lambda: sk.KWinners2d(3, 5), (2, 3, 2, 3)),
    "KWinners2d, local": (lambda: sk.KWinners2d(3, 1, local=True), (2, 3, 2, 3)),
    "SparseLinear": (lambda: sk.SparseLinear(8, 6, density=0.5, group_size=4), (3, 8)),
    "SparseConv2d": (lambda: sk.SparseConv2d(2, 3, 3, padding=1, density=0.5), (2, 2, 4, 3)),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name):
    build, shape = GRADCHECKED[name]
    layer = build().double().eval()  # in training mode each call would move the duty cycle
    x = torch.randperm(math.prod(shape)).double().view(shape).requires_grad_()  # well apart: no step changes a winner
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_op_has_a_body_for_gpus(name):
    """A Triton body, or the plain one where there is none; on CPU tensors an op that has no Triton body just runs."""
    reference = reference_of(name.split("::")[1])
    body = triton_body(reference)
    triton = Path(inspect.getfile(reference).replace("_reference.py", "_triton.py"))
    if not triton.exists():
        assert body is reference
    elif reference.__name__ not in functions_of(triton):
        with pytest.raises(TypeError, match=reference.__name__):  # the plain body's complaint about its arguments
            body()
