"""Activation checkpointing, reentrant and not: the duty cycle moves once a step, gradients are those without it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sparsekern as sk
from tolerance import assert_same_bits

# Of checkpoint_sequential, whose later segments do need gradients where its first needs none.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def model():
    """Strong boosting: a recomputation by the duty cycle after the step would choose other winners."""
    return nn.Sequential(
        sk.SparseConv2d(1, 6, 3),
        sk.KWinners2d(6, density=0.15, boost_strength=20.0),
        sk.SparseConv2d(6, 4, 3, sparse_input_grad=True),
        sk.KWinners2d(4, 1, local=True, boost_strength=20.0),
        nn.Flatten(),
        sk.SparseLinear(64, 24, density=0.5, group_size=4, sparse_input_grad=True),
        sk.KWinners(24, 6, boost_strength=20.0),
        sk.SparseLinear(24, 10, density=0.4),
    )


def plain(model, x):
    return model(x)


def whole(use_reentrant):
    return lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant)


def in_segments(use_reentrant):
    return lambda model, x: checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant)


def nested(model, x):
    def inner(x):
        return checkpoint(model[3:], model[:3](x), use_reentrant=False)

    return checkpoint(inner, x, use_reentrant=False)


WAYS = {
    "whole, reentrant": whole(True),
    "whole": whole(False),
    "in segments, reentrant": in_segments(True),
    "in segments": in_segments(False),
    "nested": nested,
}


def train(run, model, steps=3, forwards=1):
    """Everything that training leaves behind, by name: gradients of each step, and the state at its end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results = {}
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(forwards, 7, 1, 8, 8, generator=torch.Generator().manual_seed(step), requires_grad=True)
        sum(run(model, part).square().sum() for part in x).backward()
        results |= {f"grad_{name}, step {step}": p.grad.clone() for name, p in model.named_parameters()}
        results |= {f"{name}, step {step}": b.clone() for name, b in model.named_buffers()}
        results[f"grad_x, step {step}"] = x.grad
        optimizer.step()
    return results


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, name)


def test_training_is_the_same_bit_for_bit(way):
    checkpointed = model()
    twin = copy.deepcopy(checkpointed)
    assert_same(train(way, checkpointed), train(plain, twin))
    assert checkpointed[1].samples_seen == 21


def test_several_forwards_before_the_backward(way):
    """Each recomputation meets the duty cycle of its own forward."""
    checkpointed = model()
    twin = copy.deepcopy(checkpointed)
    assert_same(train(way, checkpointed, forwards=3), train(plain, twin, forwards=3))


def test_the_boosting_in_it_matters():
    """By the duty cycle after the step other units would win: the tests above can fail."""
    layer, x = sk.KWinners(24, 6, boost_strength=20.0), torch.randn(7, 24)
    layer(torch.randn(7, 24))
    assert not torch.equal(layer(x), layer(x))


def test_forwards_without_a_backward_between(way):
    """Of an evaluation that forgot eval(), or of a loss that was thrown away: the next step is right still."""
    checkpointed = model()
    twin = copy.deepcopy(checkpointed)
    x = torch.randn(5, 1, 8, 8, requires_grad=True)
    for run, m in ((way, checkpointed), (plain, twin)):
        run(m, x)
        with torch.no_grad():
            run(m, x)
    assert_same(train(way, checkpointed), train(plain, twin))


def test_eval_mode(way):
    checkpointed = model()
    checkpointed(torch.randn(5, 1, 8, 8))
    checkpointed.eval()
    twin = copy.deepcopy(checkpointed)
    assert_same(train(way, checkpointed), train(plain, twin))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backwards_in_the_order_of_their_forwards(use_reentrant):
    """As in a pipeline of micro-batches: the first forward is recomputed first."""
    layer = sk.KWinners(24, 6, boost_strength=20.0)
    twin = copy.deepcopy(layer)
    inputs = torch.randn(4, 7, 24)

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in inputs]
        for y in [run(x) for x in leaves]:
            y.square().sum().backward()
        return torch.stack([x.grad for x in leaves])

    got = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert_same_bits(got, gradients(twin), "grad_x")
    assert_same_bits(layer.duty_cycle, twin.duty_cycle, "duty_cycle")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_used_twice_in_one_segment(use_reentrant):
    """As in a recurrent network: each use has its own duty cycle."""
    layer, linear = sk.KWinners(24, 6, boost_strength=20.0), nn.Linear(24, 24)
    twin = copy.deepcopy(layer)
    x = torch.randn(7, 24, requires_grad=True)

    def run(layer, x):
        return layer(linear(layer(x)))

    (wanted,) = torch.autograd.grad(run(twin, x).square().sum(), x)
    checkpoint(run, layer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert_same_bits(x.grad, wanted, "grad_x")
    assert_same_bits(layer.duty_cycle, twin.duty_cycle, "duty_cycle")


def test_equal_inputs_are_recomputed_last_first():
    """Their forwards met different duty cycles, and backward undoes them in reverse."""
    layer = sk.KWinners(24, 6, boost_strength=20.0)
    twin = copy.deepcopy(layer)
    x = torch.randn(7, 24, requires_grad=True)
    weights = torch.randn(3, 7, 24)

    def loss(run):
        return sum((run(x) * weight).sum() for weight in weights)

    (wanted,) = torch.autograd.grad(loss(twin), x)
    (got,) = torch.autograd.grad(loss(lambda x: checkpoint(layer, x, use_reentrant=False)), x)
    assert_same_bits(got, wanted, "grad_x")


def test_a_graph_that_is_kept_and_run_again():
    layer = sk.KWinners(24, 6, boost_strength=20.0)
    x = torch.randn(7, 24, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False).square().sum()
    later = checkpoint(layer, x * 2, use_reentrant=False).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert_same_bits(second, first, "grad_x")
    later.backward()
    assert layer.samples_seen == 14
