"""The layers' rows: taken out of the paper's networks, on the inputs that they get there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from cases import POOL, Case, Options, Prepared, images, in_turn, layer_input, network, settled
from checking import Call, Checked, DenseReference, check_k_winners
from report import DENSE, OTHERS, OURS
from sparsekern.paper.plain import PlainKWinners, PlainKWinners2d

FORWARD, BACKWARD = "forward", "forward + backward"


@dataclass
class Implementation:
    """One way to compute a layer."""

    role: str
    name: str
    module: Callable
    convert: Callable[[Tensor], Tensor] = lambda t: t


def layer_cases() -> list[Case]:
    return [*k_winners_cases(), *linear_cases(), *conv_cases()]


def linear_cases():
    for name, shape in (("speech sparseCNN2", "1600->1000 d=0.4"), ("speech superSparseCNN2", "1600->1500 d=0.1")):
        for group_size in (1, 16):
            title = f"linear {shape} k=200 G={group_size}"
            for batch in (1, 64, 1024):
                yield Case(title, FORWARD, batch, partial(_prepare_linear, name, group_size, batch, False))
            yield Case(title, BACKWARD, 64, partial(_prepare_linear, name, group_size, 64, True))
    yield Case("linear 32768->4096 d=1 k=32 G=16", "decode", 1, _prepare_decode)
    yield Case("linear 1600->1000 d=0.4, dense input", FORWARD, 64, partial(_prepare_dense_linear, 1000, 0.4, 1, False))
    for work, training in ((FORWARD, False), (BACKWARD, True)):
        prepare_case = partial(_prepare_dense_linear, 1500, 0.1, 16, training)
        yield Case("linear 1600->1500 d=0.1 G=16, dense input", work, 64, prepare_case)


def conv_cases():
    for name, title in (
        ("speech sparseCNN2", "conv 64->64 5x5 on 14x14, k=1200 of 12544"),
        ("mnist sparseCNN2", "conv 32->64 5x5 on 12x12, k=400 of 4608"),
    ):
        for batch in (1, 64):
            yield Case(title, FORWARD, batch, partial(_prepare_conv, name, batch, False))
        yield Case(title, BACKWARD, 64, partial(_prepare_conv, name, 64, True))
    yield Case("conv 64->64 5x5 on 14x14, dense input", FORWARD, 64, _prepare_dense_conv)


def k_winners_cases():
    for layer, pooled, title in (
        ("winners", False, "k-winners n=1000 k=100, against torch ops"),
        ("winners1", False, "k-winners n=12544 k=1200, against torch ops"),
        ("winners1", True, "2x2 max-pooling + k-winners n=12544 k=1200, against torch ops"),
    ):
        yield Case(title, "training forward", 64, partial(_prepare_k_winners, layer, pooled))


def _inputs(name: str, layer: str, batch: int, options: Options, **kind) -> tuple[nn.Sequential, list[Tensor]]:
    """A network, and what the layer gets in it: POOL[batch] tensors of so many rows."""
    model = settled(network(name), options, **kind)
    rows = POOL[batch] * batch
    x = layer_input(model, layer, images(network(name), max(rows, 64), options))
    return model, [t.clone(memory_format=torch.preserve_format) for t in x[:rows].split(batch)]


def _prepare_linear(name: str, group_size: int, batch: int, training: bool, options: Options) -> Prepared:
    model, xs = _inputs(name, "hidden", batch, options, group_size=group_size)
    layer = model.hidden
    following = sk.KWinners(layer.out_features, density=0.1).to(options.device)
    pool = [(x, _gradient(layer, following, x) if training else None) for x in xs]
    return prepare(linear_implementations(layer, options, training), layer, pool, training)


def _prepare_conv(name: str, batch: int, training: bool, options: Options) -> Prepared:
    model, xs = _inputs(name, "conv2", batch, options)
    following = model.winners2
    pool = [(x, _gradient(model.conv2, following, x) if training else None) for x in xs]
    return prepare(_conv_implementations(model.conv2, options), model.conv2, pool, training)


def _prepare_decode(options: Options) -> Prepared:
    torch.manual_seed(0)
    layer = sk.SparseLinear(32768, 4096, density=1, group_size=16).to(options.device, options.dtype)
    encoder = nn.Sequential(nn.Linear(512, 32768), sk.KWinners(32768, 32)).to(options.device, options.dtype)
    with torch.no_grad():
        xs = encoder(torch.randn(POOL[1], 512, device=options.device, dtype=options.dtype)).split(1)
    return prepare(linear_implementations(layer, options, False), layer, [(x, None) for x in xs], False)


def _prepare_dense_linear(
    out_features: int, density: float, group_size: int, training: bool, options: Options
) -> Prepared:
    torch.manual_seed(0)
    layer = sk.SparseLinear(1600, out_features, density=density, group_size=group_size)
    layer.to(options.device, options.dtype)
    xs = torch.randn(POOL[64], 64, 1600, device=options.device, dtype=options.dtype)
    members = [(x, torch.randn_like(x[:, :out_features]) if training else None) for x in xs]
    return prepare(linear_implementations(layer, options, training), layer, members, training)


def _prepare_dense_conv(options: Options) -> Prepared:
    torch.manual_seed(0)
    layer = sk.SparseConv2d(64, 64, 5).to(options.device, options.dtype)
    xs = torch.randn(POOL[64], 64, 64, 14, 14, device=options.device, dtype=options.dtype)
    return prepare(_conv_implementations(layer, options), layer, [(x, None) for x in xs], False)


def _gradient(layer: nn.Module, following: nn.Module, x: Tensor) -> Tensor:
    """A gradient of the layer's output that comes through the layers behind it."""
    y = layer(x).detach().requires_grad_()
    z = following(y)
    return torch.autograd.grad(z, y, torch.randn_like(z))[0]


def linear_implementations(layer: sk.SparseLinear, options: Options, training: bool) -> list[Implementation]:
    dense = layer.to_dense()
    ways = [Implementation(OURS, "sparsekern", layer), *_as_written_and_compiled(DENSE, "F.linear", dense, options)]
    if options.dtype in OTHERS["bf16"]:
        low = copy.deepcopy(dense).bfloat16()
        ways += _as_written_and_compiled("bf16", "F.linear bf16", low, options, torch.Tensor.bfloat16)
    if not training and layer.density < 1 and options.dtype in OTHERS["CSR"]:
        ways.append(Implementation("CSR", "torch.sparse CSR", _csr(dense)))
    return ways


def _as_written_and_compiled(role, name, module, options, convert=lambda t: t) -> list[Implementation]:
    ways = [Implementation(role, name, module, convert)]
    if options.compiled:
        ways.append(Implementation(role, f"{name} compiled", torch.compile(module, dynamic=False), convert))
    return ways


def _csr(dense: nn.Linear) -> Callable:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        weight, bias = dense.weight.detach().to_sparse_csr(), dense.bias.detach().unsqueeze(1)
    return lambda x: torch.addmm(bias, weight, x.t()).t()


def _conv_implementations(layer: sk.SparseConv2d, options: Options) -> list[Implementation]:
    dense, last = layer.to_dense(), layer.to_dense().to(memory_format=torch.channels_last)
    contiguous = torch.Tensor.contiguous
    channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    ours_last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(layer).to(memory_format=torch.contiguous_format)
    ways = [
        Implementation(OURS, "sparsekern", ours, contiguous),
        Implementation(OURS, "sparsekern channels-last", ours_last, channels_last),
        Implementation(DENSE, "F.conv2d", dense, contiguous),
        *_as_written_and_compiled(DENSE, "F.conv2d channels-last", last, options, channels_last),
    ]
    if options.dtype in OTHERS["bf16"]:
        low = copy.deepcopy(last).bfloat16()
        ways += _as_written_and_compiled(
            "bf16", "F.conv2d bf16 channels-last", low, options, lambda t: channels_last(t.bfloat16())
        )
    return ways


def prepare(ways: list[Implementation], layer: nn.Module, pool: list, training: bool) -> Prepared:
    """The implementations on a pool of inputs and output gradients (x, grad_y)."""
    functions, calls = {}, []
    for way in ways:
        converted = [tuple(None if t is None else way.convert(t) for t in member) for member in pool]
        if training:
            parameters = list(way.module.parameters())
            converted = [(x.detach().requires_grad_(), grad_y) for x, grad_y in converted]
            function = partial(_step, way.module, parameters)
            functions[way.role, way.name] = in_turn(function, converted)
        else:
            functions[way.role, way.name] = in_turn(way.module, [x for x, _ in converted])
            function = partial(_forward, way.module)
        if way.role in (OURS, DENSE):
            members = converted if way.role == OURS else converted[:1]
            calls.append((way.role, function, members))

    def check() -> Checked:
        reference, checked = DenseReference(layer), Checked()
        for role, function, members in calls:
            for member in members:
                y, gradients = function(member)
                found = reference.check(Call(member[0], y.detach(), member[1], *gradients), is_dense=role != OURS)
                if role == OURS:
                    checked += found
        return checked

    return Prepared(functions, check, training)


def _forward(module, member):
    with torch.inference_mode():
        return module(member[0]), ()


def _step(module, parameters, member):
    x, grad_y = member
    y = module(x)
    return y, torch.autograd.grad(y, (x, *parameters), grad_y)


def _prepare_k_winners(layer: str, pooled: bool, options: Options) -> Prepared:
    """The whole of k-winners in training: boost, select, mask, duty cycle; with or without the pooling in front."""
    model, xs = _inputs("speech sparseCNN2", layer, 64, options)
    ours = model.get_submodule(layer)
    if layer != "winners":  # what comes out of its convolution and batch norm
        with torch.no_grad():
            xs = [F.batch_norm(ours.conv(x), None, None, training=True) for x in xs]
        ours.conv = ours.norm = None
    if layer != "winners" and not pooled:
        xs, ours.max_pool = [F.max_pool2d(x, ours.max_pool) for x in xs], 1
    plain = copy.deepcopy(ours)
    plain.__class__ = PlainKWinners2d if isinstance(ours, sk.KWinners2d) else PlainKWinners
    plain = nn.Sequential(nn.MaxPool2d(ours.max_pool), plain) if pooled else plain
    rivals = {(DENSE, "torch ops"): plain}
    if options.compiled:
        rivals[DENSE, "torch ops compiled"] = torch.compile(copy.deepcopy(plain), dynamic=False)
    functions = {key: in_turn(module, xs) for key, module in {(OURS, "sparsekern"): ours, **rivals}.items()}

    def check() -> Checked:
        checked = Checked()
        for x in xs:
            checked += _check_k_winners_step(ours, x)
        return checked

    return Prepared(functions, check, False)


def _check_k_winners_step(layer: nn.Module, x: Tensor) -> Checked:
    duty_cycle = layer.duty_cycle.clone()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, leaf, grad_y)
    return check_k_winners(layer, Call(x, y.detach(), grad_y, grad_x), duty_cycle)
