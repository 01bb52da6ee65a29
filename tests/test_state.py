"""State: state_dicts, copies, pickles, moves between dtypes, and weights that optimizers must leave at zero."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk


def network():
    return nn.Sequential(
        sk.SparseConv2d(1, 6, 3, density=0.6),
        sk.KWinners2d(6, 20, boost_strength=1.3, boost_strength_factor=0.9),
        nn.Flatten(),
        sk.SparseLinear(96, 30, density=0.2, group_size=4),  # the last group has 2 of 4 lanes
        sk.KWinners(30, 5, duty_cycle_period=20),
        masked(),
    )


def masked():
    """A layer of a given mask; on the meta device it would have no values to go by."""
    mask = torch.zeros(4, 30, dtype=torch.bool, device="cpu")
    mask[0, ::3] = mask[2, 1] = True
    return sk.SparseLinear.from_dense(nn.Linear(30, 4), mask=mask)


def train(model, steps, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(7, 1, 6, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.fixture
def model():
    torch.manual_seed(0)
    return train(network(), 3)


def fresh():
    torch.manual_seed(1)
    return network()


def test_a_fresh_model_has_another_mask(model):
    assert not torch.equal(fresh()[3].mask, model[3].mask)
    assert not torch.equal(fresh()[0].mask, model[0].mask)


@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_model_loads_whole_and_trains_on_to_the_same_bits(model, assign):
    other = fresh()
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert_same_state(model, other)
    assert torch.equal(model[3].mask, other[3].mask)
    sk.step_boost_strength(model)
    sk.step_boost_strength(other)
    assert_same_state(train(model, 3, seed=5), train(other, 3, seed=5))
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(model.eval()(x), other.eval()(x))


def save_and_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def safetensors_round_trip(state):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    return safetensors.load(safetensors.save(state))


@pytest.mark.parametrize("carry", [save_and_load, safetensors_round_trip])
def test_state_dict_through_a_file(model, carry):
    other = fresh()
    other.load_state_dict(carry(model.state_dict()))
    assert_same_state(model, other)


def test_safetensors_of_a_whole_model(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = fresh()
    assert safetensors.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_same_state(model, other)


def test_the_state_dict_holds_what_it_says():
    assert set(sk.KWinners(4, 2).state_dict()) == {"duty_cycle", "samples_seen", "boost_strength"}
    assert set(sk.SparseLinear(4, 2, density=0.5).state_dict()) == {"weight", "bias", "ccol_indices", "row_indices"}
    assert set(sk.SparseConv2d(1, 2, 3).state_dict()) == {"weight", "bias"}
    assert set(sk.SparseConv2d(1, 2, 3, bias=False, density=0.5).state_dict()) == {"weight", "mask"}


def test_a_dense_convolutions_state_dict_loads():
    dense, layer = nn.Conv2d(2, 3, 3, padding=1), sk.SparseConv2d(2, 3, 3, padding=1)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(layer(x), dense(x))
    dense.load_state_dict(sk.SparseConv2d(2, 3, 3).state_dict())


def linear(in_features=12, out_features=8, density=0.5, group_size=2, bias=True):
    return sk.SparseLinear(in_features, out_features, density=density, group_size=group_size, bias=bias)


def reversed_rows(state):
    first, last = state["ccol_indices"][:2]
    state["row_indices"][first:last] = state["row_indices"][first:last].flip(0)


def pointer_past_the_end(state):
    state["ccol_indices"][-1] += 1


def row_past_the_end(state):
    state["row_indices"][-1] = 4


def another_fan_in(state):
    """The last block of the last input moves to a group that lacks it there."""
    last = state["ccol_indices"][-2:]
    held = set(state["row_indices"][last[0] : last[1]].tolist())
    state["row_indices"][last[0] : last[1]] = torch.tensor(sorted({0, 1, 2, 3} - held)[: len(held)])


def weights_of_another_length(state):
    state["weight"] = state["weight"][:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 4}, r"wants weights of group_size 2, got shape \(12, 4\)"),
        ({"group_size": 1}, r"wants weights of group_size 2, got shape \(48, 1\)"),
        ({"density": 0.25}, "wants 24 blocks .* got 12"),
        ({"out_features": 10}, "wants 24 blocks .* got 30"),
        ({"in_features": 13, "density": 0.46}, "wants in_features 12, got 13"),
        (reversed_rows, "wants row_indices ascending within each input"),
        (pointer_past_the_end, "wants ccol_indices ascending from 0 to the number of blocks"),
        (row_past_the_end, r"wants row_indices in 0\.\.3, got 0\.\.4"),
        (another_fan_in, "wants fan-in 6 for every output unit"),
        (weights_of_another_length, "wants 24 blocks .* got 24 and 23 weights"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_fit_is_refused_and_nothing_changes(change, message):
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Identity(), linear())
    before = copy.deepcopy(layer)
    state = linear(**(change if isinstance(change, dict) else {})).state_dict()
    if callable(change):
        change(state)
    with pytest.raises(RuntimeError, match=f"SparseLinear 1: {message}"):
        layer.load_state_dict({f"1.{name}": value for name, value in state.items()})
    assert_same_state(layer, before)


def test_another_out_features_with_as_many_groups_is_refused():
    """14 and 16 outputs make one group of 16 alike; only the bias tells them apart."""
    layer = linear(out_features=14, group_size=16)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"SparseLinear .root.: wants out_features 14"):
        layer.load_state_dict(linear(out_features=16, group_size=16).state_dict())
    assert_same_state(layer, before)


@pytest.mark.parametrize("bias", [True, False])
def test_lanes_that_no_output_uses_may_hold_anything(bias):
    """As after an initialisation of the user's own."""
    one, other = (linear(out_features=14, group_size=16, bias=bias) for _ in range(2))
    nn.init.normal_(one.weight)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.mask, one.mask)
    assert (other.weight[:, 14:] == 0).all()
    x = torch.randn(3, 12)
    assert torch.equal(other(x), one(x))


def of_int64(state):
    state["row_indices"] = state["row_indices"].long()


def of_two_dimensions(state):
    state["ccol_indices"] = state["ccol_indices"][None]


def no_tensor(state):
    state["weight"] = state["weight"].tolist()


def only(*names):
    def change(state):
        for name in set(state) - set(names):
            del state[name]

    change.__name__ = " ".join(names)
    return change


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([of_int64], "wants row_indices of one dimension in int32, got torch.int64"),
        ([of_two_dimensions], r"wants ccol_indices of one dimension in int32, got torch.int32 of shape \(1, 13\)"),
        ([no_tensor], "wants a tensor for weight, got list"),
        ([row_past_the_end, only("row_indices")], r"wants row_indices in 0\.\.3, got 0\.\.4"),
        ([pointer_past_the_end, only("ccol_indices")], "wants ccol_indices ascending from 0"),
        ([another_fan_in, only("ccol_indices", "row_indices")], "wants fan-in 6"),
        ([weights_of_another_length, only("weight")], "wants 24 blocks .* got 24 and 23 weights"),
    ],
    ids=lambda value: " ".join(f.__name__ for f in value) if isinstance(value, list) else "",
)
def test_each_part_of_a_support_is_checked(changes, message, assign, strict):
    torch.manual_seed(3)
    layer = linear()
    before, state = copy.deepcopy(layer), dict(linear().state_dict())
    for change in changes:
        change(state)
    with pytest.raises(RuntimeError, match=f"SparseLinear .root.: {message}") as error:
        layer.load_state_dict(state, assign=assign, strict=strict)
    assert ("Missing key" in str(error.value)) == (strict and len(state) < 4)
    assert_same_state(layer, before)
    layer(torch.randn(2, 12))


def test_a_parametrised_layers_indices_are_checked():
    layer = nn.utils.parametrizations.weight_norm(linear())
    state = copy.deepcopy(layer.state_dict())
    assert "weight" not in state
    row_past_the_end(state)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"wants row_indices in 0\.\.3"):
        layer.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_parts_of_a_state_dict_load():
    one, other = linear(), linear()
    other.load_state_dict({"weight": one.weight, "bias": one.bias}, strict=False)
    assert torch.equal(other.weight, one.weight)
    other.load_state_dict({n: getattr(one, n) for n in ("ccol_indices", "row_indices")}, strict=False)
    x = torch.randn(3, 12)
    assert torch.equal(other(x), one(x))


def test_missing_and_unexpected_names_are_reported():
    state = linear().state_dict()
    del state["row_indices"]
    with pytest.raises(RuntimeError, match=r"Missing key.*row_indices"):
        linear().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        linear(bias=False).load_state_dict(linear().state_dict())


def test_a_given_masks_layer_loads_any_support_of_its_size():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :3] = True
    one = sk.SparseLinear.from_dense(nn.Linear(6, 4), mask=mask)
    other = sk.SparseLinear.from_dense(nn.Linear(6, 4), mask=mask.flip(0))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.mask, mask)
    mask[3, 5] = True
    with pytest.raises(RuntimeError, match="wants 3 blocks"):
        other.load_state_dict(sk.SparseLinear.from_dense(nn.Linear(6, 4), mask=mask).state_dict())


@pytest.mark.parametrize(
    "twin",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
    ],
    ids=["deepcopy", "pickle", "both"],
)
def test_copies_are_the_same_and_independent(model, twin):
    other, before = twin(model), copy.deepcopy(model.state_dict())
    assert repr(other) == repr(model)
    assert_same_state(model, other)
    train(other, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same_state(train(model, 2), other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_moving_to_another_dtype_keeps_what_is_exact(model, dtype):
    before = copy.deepcopy(model)
    assert model.to(dtype) is model
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before.get_buffer(name).dtype, name
        assert torch.equal(buffer, before.get_buffer(name)), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name).to(dtype)), name
    train(model, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert int(model[1].samples_seen) == 28


def test_half_and_double():
    layer = sk.SparseLinear(8, 4, density=0.5)
    assert layer.half()(torch.randn(2, 8).half()).dtype == torch.float16
    assert layer.double()(torch.randn(2, 8).double()).dtype == torch.float64
    assert layer.ccol_indices.dtype == layer.row_indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_dict_loads_into_a_layer_of_another_dtype(dtype):
    one, other = linear(), linear().to(dtype)
    other.load_state_dict(one.state_dict())
    assert other.weight.dtype == dtype
    assert torch.equal(other.weight, one.weight.to(dtype))
    assert torch.equal(other.mask, one.mask)


def test_from_the_meta_device():
    with torch.device("meta"):
        model = network()
    assert all(t.is_meta for t in model.state_dict().values())
    trained = train(fresh(), 2)
    model.load_state_dict(trained.state_dict(), assign=True)
    assert_same_state(model, trained)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty[3].reset_parameters()
    assert (empty[3].mask.sum(1) == empty[3].fan_in).all()
    empty.load_state_dict(trained.state_dict())
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(empty(x), model(x))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_do_not_exist_stay_zero(model, name):
    masks = {0: model[0].mask.clone(), 3: model[3].mask.clone(), 5: model[5].mask.clone()}
    before = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(7, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    for i, mask in masks.items():
        weight = model[i].to_dense().weight
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != before[i].to_dense().weight[mask]).all()
        assert torch.equal(model[i].mask, mask)
    assert (model[0].weight[~masks[0]] == 0).all()
    # The lanes past the 30 outputs, 2 in each block of the last group of 4.
    assert (model[3].weight[model[3].row_indices == 7, 2:] == 0).all()


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def k_winners_steps(layer, batches=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        batches,
        8,
        *([400] if isinstance(layer, sk.KWinners) else [4, 10, 10]),
        generator=generator,
        dtype=torch.float32,
    )
    return torch.stack([layer(batch) for batch in x]), layer.duty_cycle


K_WINNERS = {
    "KWinners": lambda: sk.KWinners(400, 40, boost_strength=3.0),
    "KWinners2d": lambda: sk.KWinners2d(4, 40, boost_strength=3.0, max_pool=2),
}


@pytest.mark.parametrize("make", K_WINNERS.values(), ids=K_WINNERS)
def test_k_winners_buffers_are_float32_whatever_the_default_dtype(make, default_dtype):
    layer = make()
    torch.set_default_dtype(torch.float32)
    for found, wanted in zip(k_winners_steps(layer), k_winners_steps(make()), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", K_WINNERS.values(), ids=K_WINNERS)
def test_k_winners_buffers_of_another_dtype_are_cast(make, dtype):
    state = {name: t.to(dtype) for name, t in make().state_dict().items()}
    loaded, given = make(), make()
    loaded.load_state_dict(state, assign=True)
    given.boost_strength = state["boost_strength"]
    wanted = k_winners_steps(make())
    for layer in (loaded, given):
        for ours, theirs in zip(k_winners_steps(layer), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_a_copy_of_a_k_winners_layer_has_no_forwards_to_recompute():
    layer = sk.KWinners(1000, 100)
    with torch.no_grad():
        for _ in range(70):
            layer(torch.randn(2, 1000))
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() < 20000
