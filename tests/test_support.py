"""What a layer prepares of its support for the kernels follows the support, however that changes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sparsekern as sk

I, O = 512, 320
GROUP_SIZES = [1, 4]


def layer(seed, group_size=1, density=0.1):
    torch.manual_seed(seed)
    return sk.SparseLinear(I, O, density=density, group_size=group_size)


def rows(count=40):
    return torch.randn(count, I, generator=torch.Generator().manual_seed(3))


def assert_right(y, like, x):
    torch.testing.assert_close(y, like.to_dense()(x))


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_another_layers_state_in_a_functional_call(group_size, run):
    one, other, x = layer(0, group_size), layer(1, group_size), rows()
    assert_right(run(lambda state: functional_call(one, state, (x,)))(other.state_dict()), other, x)
    assert_right(one(x), one, x)


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_another_layers_state_copied_in_place(group_size, run):
    one, other, x = layer(0, group_size), layer(1, group_size), rows()
    with torch.no_grad():
        for name, value in one.state_dict().items():
            value.copy_(other.state_dict()[name])
    assert_right(run(one)(x), other, x)


def test_a_buffer_in_the_place_of_one_that_is_gone():
    """Python gives a new tensor the id of one that nobody holds any more."""
    one, other, x = layer(0), layer(1), rows()
    for name in ("weight", "bias", "ccol_indices", "row_indices"):
        value = getattr(other, name).detach().clone()
        setattr(one, name, None)
        value = value.clone()
        setattr(one, name, nn.Parameter(value) if value.is_floating_point() else value)
    assert_right(one(x), other, x)


def load(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded_state(made):
    twin = layer(5, made.group_size)
    with torch.inference_mode():
        twin.load_state_dict(made.state_dict())
    return twin


@pytest.mark.parametrize("twin", [copy.deepcopy, load, loaded_state])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_prepared_in_inference_mode_it_trains(group_size, twin):
    made, x = layer(0, group_size), rows()
    other = twin(made)
    with torch.inference_mode():
        assert_right(other(x), made, x)
    other(x).sum().backward()
    made(x).sum().backward()
    assert torch.equal(other.weight.grad, made.weight.grad)


@pytest.mark.parametrize("twin", [copy.deepcopy, load])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_copy_is_prepared_and_no_larger(group_size, twin):
    made = layer(0, group_size)
    other = twin(made)
    assert other._packed.made_of is other.row_indices
    assert (other._packed.bits is None) == (made._packed.bits is None)
    file = io.BytesIO()
    torch.save(made, file)
    stored = sum(t.nbytes for t in made.state_dict().values())
    assert file.tell() < stored + 20_000


def test_the_support_is_all_that_its_buffers_hold():
    """DDP sends all buffers of rank 0 to the others: none may have a length that the random support decides."""
    assert {name for name, _ in layer(0).named_buffers()} == {"ccol_indices", "row_indices"}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_under_another_default_device(group_size):
    made, x = layer(0, group_size), rows()
    with torch.device("meta"):
        twin = copy.deepcopy(made)
        twin.row_indices += 0  # another version: it is prepared again
        y = twin(x)
    assert_right(y, made, x)
    with torch.device("meta"):
        fresh = sk.SparseLinear(I, O, density=0.1, group_size=group_size, device="cpu")
        mask = sk.SparseConv2d(3, 4, 3, density=0.5, device="cpu").mask
    assert (fresh.mask.sum(1) == fresh.fan_in).all()
    assert_right(fresh(x), fresh, x)
    assert (mask.sum((1, 2, 3)) == 14).all()


def test_a_move_prepares_anew():
    made = layer(0)
    before = made._packed
    assert made.double()._packed is before  # the indices are the same
    moved = copy.deepcopy(made).to("meta")
    assert moved._packed.bits is None
    empty = moved.to_empty(device="cpu")
    empty.load_state_dict(made.state_dict())
    assert_right(empty(rows().double()), made, rows().double())


@pytest.mark.parametrize("garbage", [-1, 10**8])
def test_a_copy_of_a_layer_without_values_yet(garbage):
    made = layer(0)
    empty = copy.deepcopy(made).to("meta").to_empty(device="cpu")
    for indices in (empty.ccol_indices, empty.row_indices):
        indices.fill_(garbage)
    twin = copy.deepcopy(empty)
    twin.load_state_dict(made.state_dict())
    assert_right(twin(rows()), made, rows())


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_what_is_prepared(strict):
    made, x = layer(0, 4).eval(), rows()
    with torch.no_grad():
        program = torch.export.export(made, (x,), strict=strict)
    [call] = [node for node in program.graph.nodes if "sparse_linear" in str(node.target)]
    assert len(call.args) == (6 if made._packed.bits is None else 8)
    assert_right(program.module()(x), made, x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_functional_call(strict):
    one, other, x = layer(0), layer(1), rows()

    class Call(nn.Module):
        def forward(self, state, x):
            return functional_call(one, state, (x,))

    program = torch.export.export(Call(), (other.state_dict(), x), strict=strict)
    assert_right(program.module()(other.state_dict(), x), other, x)
