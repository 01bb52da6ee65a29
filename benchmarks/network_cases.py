"""The networks' rows: training steps and inference of the paper's networks, against plain PyTorch and dense ReLU twins."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from cases import POOL, Case, Options, Prepared, images, in_turn, network, settled
from checking import Call, Checked, DenseReference, check_k_winners
from checking_convolved import check_convolved
from report import DENSE, OURS
from sparsekern.paper.networks import CLASSES, Network
from sparsekern.paper.plain import rezero_

STEP, INFERENCE = "training step", "inference"


def network_cases() -> list[Case]:
    cases = []
    for name, group_size in (
        ("mnist sparseCNN2", 1),
        ("mnist sparseCNN2", 16),
        ("speech sparseCNN2", 1),
        ("speech superSparseCNN2", 1),
    ):
        title = f"{name} G={group_size}"
        cases.append(Case(title, STEP, 64, partial(_prepare, name, group_size, 64, True)))
        for batch in (1, 64):
            cases.append(Case(title, INFERENCE, batch, partial(_prepare, name, group_size, batch, False)))
    return cases


def _prepare(name: str, group_size: int, batch: int, training: bool, options: Options) -> Prepared:
    net = network(name)
    torch.manual_seed(2)
    pool = [
        (images(net, batch, options), torch.randint(CLASSES, (batch,), device=options.device))
        for _ in range(POOL[batch])
    ]
    functions, ours = {}, []
    for role, kind in ((OURS, {}), ("plain", {"plain": True}), (DENSE, {"dense": True})):
        for form, channels_last, compiled in _forms(options):
            model = settled(net, options, group_size=group_size, **kind).train(training)
            model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            members = [(_layout(x, channels_last), labels) for x, labels in pool]
            if role == OURS and not compiled:
                ours.append((model, members))
            run = torch.compile(model, dynamic=False) if compiled else model
            function = partial(_step, run, _optimizer(net, model, role)) if training else partial(_infer, run)
            functions[role, f"{role}{form}"] = in_turn(function, members)

    def check() -> Checked:
        checked = Checked()
        for model, members in ours:
            for x, labels in members:
                checked += check_network(model, x, labels)
        return checked

    return Prepared(functions, check, training)


def _forms(options: Options) -> list[tuple[str, bool, bool]]:
    """How each network is run: a name, whether channels-last, whether compiled."""
    forms = [("", False, False), (" channels-last", True, False)]
    if options.compiled:
        forms += [(" compiled", False, True), (" compiled channels-last", True, True)][options.device != "cpu" :]
    return forms


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _optimizer(net: Network, model: nn.Module, role: str) -> torch.optim.Optimizer:
    """The paper's, with a step so small that the same few batches can be trained on for thousands of steps."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, net.momentum, weight_decay=net.weight_decay, fused=True)
    if role == "plain":
        optimizer.register_step_post_hook(lambda *_: rezero_(model))
    return optimizer


def _step(model, optimizer, member) -> None:
    x, labels = member
    optimizer.zero_grad()
    F.nll_loss(model(x), labels).backward()
    optimizer.step()


def _infer(model, member) -> Tensor:
    return model(member[0])


def check_network(model: nn.Sequential, x: Tensor, labels: Tensor) -> Checked:
    """Checks each layer that multiplies or chooses on the very input and gradient that it gets in the network.

    Layer by layer, since one winner more or less after a rounding is no error, yet changes all that follows.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor | None]] = []

    def record(module, args, y):
        if y.requires_grad and y.grad_fn is not None:
            y.retain_grad()
        calls.append((module, args[0], y))

    duty_cycles = {m: m.duty_cycle.clone() for m in model.modules() if isinstance(m, (sk.KWinners, sk.KWinners2d))}
    handles = [layer.register_forward_hook(record) for layer in model.children()]
    model.zero_grad()
    try:
        if model.training:
            F.nll_loss(model(x), labels).backward()
        else:
            with torch.inference_mode():
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    checked = Checked()
    for module, inputs, y in calls:
        checked += _check_layer(module, inputs, y, model.training, duty_cycles)
    model.zero_grad()
    return checked


def _check_layer(module: nn.Module, inputs: Tensor, y: Tensor, training: bool, duty_cycles) -> Checked:
    call = Call(inputs.detach().clone(), y.detach().clone())
    if training:
        call.grad_y, call.grad_x = y.grad, inputs.grad
    if getattr(module, "conv", None) is not None:
        if training:
            call.grad_weight, call.grad_bias = module.conv.weight.grad, module.conv.bias.grad
        return check_convolved(module, call, duty_cycles[module])
    if module in duty_cycles:
        return check_k_winners(module, call, duty_cycles[module])
    if isinstance(module, (nn.Linear, nn.Conv2d, sk.SparseLinear, sk.SparseConv2d)):
        if training:
            call.grad_weight, call.grad_bias = module.weight.grad, module.bias.grad
        return DenseReference(module).check(call)
    return Checked()
