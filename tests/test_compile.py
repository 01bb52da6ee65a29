"""torch.compile without graph breaks, its recompilations, torch.export and fake tensors."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sparsekern as sk
from tolerance import assert_same_bits, assert_sums_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test is met."""
    torch.compiler.reset()


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# Each layer with the input of a batch of B. Every layer boosts and trains where it can.
LAYERS = {
    "KWinners": (lambda: sk.KWinners(40, 8, boost_strength=1.5), lambda B: torch.randn(B, 40)),
    "KWinners of sequences": (lambda: sk.KWinners(40, density=0.1), lambda B: torch.randn(B, 3, 40)),
    "KWinners of all": (lambda: sk.KWinners(40, 40), lambda B: torch.randn(B, 40)),
    "KWinners2d": (lambda: sk.KWinners2d(6, 30), lambda B: torch.randn(B, 6, 4, 5)),
    "KWinners2d by density": (lambda: sk.KWinners2d(6, density=0.1), lambda B: torch.randn(B, 6, 4, 5)),
    "KWinners2d local": (lambda: sk.KWinners2d(6, 2, local=True), lambda B: torch.randn(B, 6, 4, 5)),
    "KWinners2d channels-last": (lambda: sk.KWinners2d(6, 30), lambda B: channels_last(B, 6, 4, 5)),
    "SparseLinear": (lambda: sk.SparseLinear(40, 21, density=0.3), lambda B: torch.randn(B, 40).relu()),
    "SparseLinear of groups": (
        lambda: sk.SparseLinear(40, 21, density=0.3, group_size=4, sparse_input_grad=True),
        lambda B: torch.randn(B, 3, 40).relu(),
    ),
    "SparseLinear without bias": (
        lambda: sk.SparseLinear(40, 21, bias=False, density=0.3),
        lambda B: torch.randn(B, 40).relu(),
    ),
    "SparseConv2d": (
        lambda: sk.SparseConv2d(3, 5, 3, stride=2, padding=1),
        lambda B: torch.randn(B, 3, 6, 5).relu(),
    ),
    "SparseConv2d of few weights": (
        lambda: sk.SparseConv2d(3, 5, (2, 3), density=0.4, sparse_input_grad=True),
        lambda B: torch.randn(B, 3, 6, 5).relu(),
    ),
    "SparseConv2d channels-last": (lambda: sk.SparseConv2d(3, 5, 3), lambda B: channels_last(B, 3, 6, 5).relu()),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer and a function from a batch size to its input."""
    make, inputs = LAYERS[request.param]
    return make(), inputs


def small_model():
    """Every layer in one network, (B, 1, 10, 10) -> (B, 10)."""
    return nn.Sequential(
        sk.SparseConv2d(1, 6, 3),
        nn.MaxPool2d(2),
        sk.KWinners2d(6, density=0.15),
        sk.SparseConv2d(6, 8, 3, density=0.5, sparse_input_grad=True),
        sk.KWinners2d(8, 2, local=True),
        nn.Flatten(),
        sk.SparseLinear(32, 24, density=0.5, group_size=4, sparse_input_grad=True),
        sk.KWinners(24, 6, boost_strength=1.5),
        sk.SparseLinear(24, 10, density=0.4),
    )


def step(run, layer, x, grad_y):
    """One training step's results by name: output, gradients and the layer's buffers after it."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(grad_y)
    results = {"y": y.detach(), "grad_x": x.grad}
    results |= {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
    return results | {name: b.clone() for name, b in layer.named_buffers()}


def assert_bias_gradient(actual, grad_y, what):
    """A bias's gradient is added up by PyTorch, in another order where it is compiled."""
    others = [d for d in range(grad_y.dim()) if d != (1 if grad_y.dim() == 4 else grad_y.dim() - 1)]
    exact, magnitude, terms = (t.double().sum(others) for t in (grad_y, grad_y.abs(), torch.ones_like(grad_y)))
    assert_sums_close(actual, exact, magnitude, terms, what)


def assert_same_step(got, wanted, grad_y, what):
    """The same bits but for the last layer's bias, whose output's gradient is grad_y."""
    for name, value in got.items():
        if name.startswith("grad_") and name.endswith("bias"):
            assert_bias_gradient(value, grad_y, f"{name}, {what}")
        else:
            assert_same_bits(value, wanted[name], f"{name}, {what}")


def test_a_layer_trains_as_in_eager_mode(case):
    layer, inputs = case
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for B in (4, 4, 7):
        x = inputs(B)
        grad_y = torch.randn_like(twin(x))
        twin.load_state_dict(layer.state_dict())
        wanted = step(twin, twin, x, grad_y)
        assert_same_step(step(compiled, layer, x, grad_y), wanted, grad_y, f"B={B}")


def test_a_layer_in_eval_mode_as_in_eager_mode(case):
    layer, inputs = case
    layer(inputs(5))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(4)
    with torch.no_grad():
        y, wanted = compiled(x), layer(x)
    assert_same_bits(y, wanted, "y")
    assert y.stride() == wanted.stride()
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_batch_sizes_need_one_dynamic_graph(case):
    """The second size that is met makes the size symbolic; no later one compiles again."""
    layer, inputs = case
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for B in (4, 7):
        compiled(inputs(B))
    assert counter.frame_count <= 2
    seen = counter.frame_count
    for B in (12, 3, 64):
        x = inputs(B)
        with torch.no_grad():  # with gradients a dense convolution may be PyTorch's own node, which is not traced
            wanted = copy.deepcopy(layer)(x)
        assert_same_bits(compiled(x).detach(), wanted, f"y of {B}")
    assert counter.frame_count == seen


def test_map_sizes_need_one_dynamic_graph():
    counter = CompileCounterWithBackend("eager")
    layer = sk.KWinners2d(4, density=0.1)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for size in (5, 6, 8, 9, 11):
        compiled(torch.randn(2, 4, size, size))
    assert counter.frame_count == 1


def test_a_new_boost_strength_does_not_compile_again():
    layer = sk.KWinners(40, 8, boost_strength=4.0, boost_strength_factor=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, 40)
    compiled(x)
    before = counter.frame_count
    sk.step_boost_strength(layer)
    outputs = []
    for strength in (2.0, 30.0, 0.0):  # 2.0 is where the step has led to
        layer.boost_strength = strength
        twin = copy.deepcopy(layer)
        outputs.append(compiled(x))
        assert_same_bits(outputs[-1], twin(x), f"y at {strength}")
        assert_same_bits(layer.duty_cycle, twin.duty_cycle, f"duty_cycle at {strength}")
    assert not torch.equal(outputs[1], outputs[2])  # it does decide who wins
    assert counter.frame_count == before


def test_each_mode_compiles_once():
    layer = sk.KWinners(40, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, 40)
    for _ in range(2):
        for training in (True, False):
            layer.train(training)
            assert ((compiled(x) != 0).sum(1) == (8 if training else 12)).all()
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "function", ["k_winners", "k_winners2d", "k_winners2d local", "sparse_linear", "sparse_conv2d"]
)
def test_a_function_as_in_eager_mode(function):
    F = sk.functional
    layer = sk.SparseLinear(40, 21, density=0.3)
    weight = torch.randn(5, 6, 3, 3)
    f, x = {
        "k_winners": (lambda x: F.k_winners(x, 8, torch.linspace(0, 1, 40), 2.0), torch.randn(4, 40)),
        "k_winners2d": (lambda x: F.k_winners2d(x, 30), torch.randn(4, 6, 4, 5)),
        "k_winners2d local": (
            lambda x: F.k_winners2d(x, 2, torch.linspace(0, 1, 6), 2.0, local=True),
            torch.randn(4, 6, 4, 5),
        ),
        "sparse_linear": (
            lambda x: F.sparse_linear(x, layer.weight, layer.ccol_indices, layer.row_indices, 21, layer.bias),
            torch.randn(4, 40),
        ),
        "sparse_conv2d": (lambda x: F.sparse_conv2d(x, weight, stride=(1, 2), padding=1), torch.randn(4, 6, 4, 5)),
    }[function]
    grad_y = torch.randn_like(f(x))
    nothing = nn.Module()
    wanted = step(f, nothing, x, grad_y)
    assert_same_step(
        step(torch.compile(f, fullgraph=True, backend="aot_eager"), nothing, x, grad_y), wanted, grad_y, function
    )
    with torch.no_grad():
        assert_same_bits(torch.compile(f, fullgraph=True, backend="aot_eager")(x), wanted["y"], "y without gradients")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = nn.Sequential(sk.KWinners(40, 8), sk.SparseLinear(40, 16, density=0.3, group_size=4)).to(dtype)
    twin = copy.deepcopy(model)
    x, grad_y = torch.randn(5, 40, dtype=dtype), torch.randn(5, 16, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(step(compiled, model, x, grad_y), step(twin, twin, x, grad_y), grad_y, str(dtype))


def test_under_autocast():
    model = nn.Sequential(sk.KWinners(40, 8), sk.SparseLinear(40, 16, density=0.3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 40)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y, wanted = compiled(x), twin(x)
        assert y.dtype == torch.bfloat16
        assert_same_bits(y.detach(), wanted.detach(), "y")
        y.float().square().sum().backward()
        wanted.float().square().sum().backward()
        assert_same_bits(model[1].weight.grad, twin[1].weight.grad, "grad_weight")


def without_pointwise():
    """A network of which inductor has nothing to write in C++, which would take it most of a minute."""
    return nn.Sequential(
        sk.SparseLinear(100, 24, bias=False, density=0.5, group_size=4),
        sk.KWinners(24, 6, boost_strength=1.5),
        sk.SparseLinear(24, 10, bias=False, density=0.4, sparse_input_grad=True),
    )


@pytest.mark.parametrize("make", [without_pointwise, pytest.param(small_model, marks=pytest.mark.slow)])
def test_inductor_trains_a_network_as_eager_mode_does(make):
    model = make()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    arrived = {}  # the gradient of each layer's output
    for name, layer in twin.named_children():
        layer.register_full_backward_hook(lambda _, __, grads, name=name: arrived.update({name: grads[0]}))
    for B in (3, 5):
        x, grad_y = torch.randn(B, 100), torch.randn(B, 10)
        x = x.view(B, 1, 10, 10) if make is small_model else x
        wanted = step(twin, twin, x, grad_y)
        for name, value in step(compiled, model, x, grad_y).items():
            if name.endswith(".bias"):
                layer = name.removeprefix("grad_").removesuffix(".bias")
                assert_bias_gradient(value, arrived[layer], f"{name} of {B}")
            else:
                assert_same_bits(value, wanted[name], f"{name} of {B}")


@pytest.mark.parametrize("training", [True, False])
def test_export(training, tmp_path):
    """The exported program is that of any batch size, and survives a file."""
    model = small_model().train(training)
    twin = copy.deepcopy(model)
    batch = torch.export.Dim("B", min=2, max=4096)
    program = torch.export.export(model, (torch.randn(4, 1, 10, 10),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B in (2, 4, 33):
        x = torch.randn(B, 1, 10, 10)
        assert_same_bits(loaded(x).detach(), twin(x).detach(), f"y of {B}")
        buffers = dict(loaded.named_buffers())
        for name, value in twin.named_buffers():
            assert_same_bits(buffers[name], value, f"{name} after {B}")


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors(case, training):
    """Shapes, dtypes and strides without values, forward and backward, are those of the real run."""
    layer, inputs = case
    layer.train(training)
    x = inputs(4).requires_grad_()
    y = layer(x)
    grad_y = torch.randn_like(y)
    real = torch.autograd.grad(y, [x, *layer.parameters()], grad_y)
    twin, state = copy.deepcopy(layer), layer.state_dict()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in state.items()}
        fake_x = mode.from_tensor(x)
        parameters = {n: fakes[n].requires_grad_() for n, _ in layer.named_parameters()}
        fake_y = torch.func.functional_call(twin, fakes, fake_x)
        fake = torch.autograd.grad(fake_y, [fake_x, *parameters.values()], mode.from_tensor(grad_y))
    for f, r in zip((fake_y, *fake), (y, *real), strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())
    assert isinstance(fake_y, FakeTensor)


def test_meta_device(case):
    """A network's shapes can be asked for without memory."""
    layer, inputs = case
    x = inputs(4)
    y = layer(x)
    meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (y.shape, y.dtype, y.stride())


def test_the_graph_keeps_the_ops_whole(case):
    """Traced with symbolic sizes, a layer is its ops: no body of one is inlined."""
    layer, inputs = case
    layer.eval()
    graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(inputs(4)).graph
    ops = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    wanted = {sk.KWinners: "k_winners", sk.KWinners2d: "k_winners"}.get(type(layer))
    wanted = wanted or {sk.SparseLinear: "sparse_linear", sk.SparseConv2d: "sparse_conv2d"}[type(layer)]
    is_relu = getattr(layer, "k", None) == getattr(layer, "n", 0)
    assert [op for op in ops if op.startswith("sparsekern")] == ([] if is_relu else [f"sparsekern.{wanted}.default"])
