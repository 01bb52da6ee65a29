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
