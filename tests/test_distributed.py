"""Two processes on one machine (gloo): one duty cycle, that of the global batch; DDP, FSDP2, compilation, checkpointing.

Run as a program, this file is one rank: it runs every scenario and saves what they return. Of uneven batches the duty
cycle is still that of the whole; what a rank may not do is to call a training layer more often than the others do.
"""

import copy
import os
import subprocess
import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sparsekern as sk
from tolerance import assert_same_bits

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo backend"
)
RANKS = 2
SECONDS = 300  # for everything; a collective that one rank misses gives up sooner
COLLECTIVE_SECONDS = 60
STEPS, B = 5, 8


def small_model(seed=1):
    """In float64, so that two orders of adding a gradient differ too little to change who wins."""
    torch.manual_seed(seed)
    return nn.Sequential(
        sk.SparseConv2d(1, 6, 3),
        sk.KWinners2d(6, density=0.15, boost_strength=1.5),
        sk.SparseConv2d(6, 4, 3, density=0.5),
        sk.KWinners2d(4, 1, local=True, boost_strength=1.5),
        nn.Flatten(),
        sk.SparseLinear(64, 24, density=0.5, group_size=4, sparse_input_grad=True),
        sk.KWinners(24, 6, boost_strength=1.5, duty_cycle_period=20),
        sk.SparseLinear(24, 10, density=0.4),
    ).double()


def k_winners_layers():
    return nn.ModuleDict(
        {
            "plain": sk.KWinners(24, 6, boost_strength=3.0, duty_cycle_period=20),
            "map": sk.KWinners2d(6, 20, boost_strength=3.0),
            "local": sk.KWinners2d(6, 2, local=True, boost_strength=3.0),
        }
    )


def batches():
    """STEPS global batches: of images and labels, and of inputs to each k-winners layer."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(STEPS, B, *shape, generator=generator)

    images, labels = randn(1, 8, 8).double(), torch.randint(10, (STEPS, B), generator=generator)
    return images, labels, {"plain": randn(24), "map": randn(6, 3, 4), "local": randn(6, 3, 4)}


def train(run, model, rows):
    """What SGD leaves of model after STEPS steps on some rows of each batch; run is the model, perhaps wrapped."""
    images, labels, _ = batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, label in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(x[rows]), label[rows]).backward()
        optimizer.step()
    return state(model)


def state(model):
    """A copy of a state_dict, of whole tensors."""
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    return {name: t.detach().clone() for name, t in full.items()}


def forwards(layers, rows):
    """The buffers of each k-winners layer after each forward."""
    inputs, seen = batches()[2], []
    for step in range(STEPS):
        for name, layer in layers.items():
            layer(inputs[name][step][rows])
        seen.append(state(layers))
    return seen


def half(rank):
    return slice(rank * B // RANKS, (rank + 1) * B // RANKS)


# Scenarios: what each rank runs, by name. All of them in one pair of processes, whose start is what takes time.


def duty_cycle(rank):
    return forwards(k_winners_layers(), half(rank))


def uneven_duty_cycle(rank):
    return forwards(k_winners_layers(), (slice(0, 5), slice(5, 8))[rank])


def duty_cycle_of_an_idle_rank(rank):
    return forwards(k_winners_layers(), (slice(0, 0), slice(0, 8))[rank])


def compiled_duty_cycle(rank):
    layers = k_winners_layers()
    compiled = {name: torch.compile(layer, fullgraph=True, backend="aot_eager") for name, layer in layers.items()}
    inputs = batches()[2]
    for step in range(STEPS):
        for name, layer in compiled.items():
            layer(inputs[name][step][half(rank)])
    return state(layers)


def ddp(rank):
    model = small_model(seed=1 + rank)  # other supports and weights on each rank, until DDP gives all those of rank 0
    return train(DistributedDataParallel(model), model, half(rank))


def large_layers(seed):
    """Layers for whose supports the kernels are prepared."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(sk.SparseLinear(512, 512, density=0.1, group_size=group_size) for group_size in (1, 1, 4)),
        sk.SparseLinear(512, 512, density=0.3),
    ).double()


def large_rows():
    return torch.randn(B, 512, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def large_ddp(rank):
    model = large_layers(seed=1 + rank)
    return DistributedDataParallel(model)(large_rows()).detach()


def large_compiled_ddp(rank):
    model = large_layers(seed=1 + rank)
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")(large_rows()).detach()


def compiled_ddp(rank):
    model = small_model()
    return train(torch.compile(DistributedDataParallel(model), backend="aot_eager"), model, half(rank))


def checkpointed_ddp(rank):
    model = small_model()
    wrapped = DistributedDataParallel(model)

    def run(x):
        return checkpoint(wrapped, x, use_reentrant=False)

    return train(run, model, half(rank))


def fsdp(rank):
    model = small_model()
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    fully_shard(model)
    assert model[5].weight.to_local().numel() < model[5].weight.numel()  # it is sharded
    return train(model, model, half(rank))


def fsdp_state(rank):
    """What a sharded layer says of itself, and that it loads its own state_dict."""
    torch.manual_seed(1)
    layers = nn.Sequential(sk.SparseLinear(64, 40, density=0.2, group_size=16), sk.SparseLinear(40, 24, density=0.2))
    whole = copy.deepcopy(layers)
    fully_shard(layers)
    layers.load_state_dict(layers.state_dict())
    results = {}
    for i, (got, wanted) in enumerate(zip(layers, whole, strict=True)):
        weight = got.densify(got.weight)
        pairs = {
            "mask": (got.mask, wanted.mask),
            "density": (torch.tensor(got.density), torch.tensor(wanted.density)),
            "densify": (weight.detach(), wanted.densify(wanted.weight).detach()),
            "to_dense": (got.to_dense().weight.detach(), wanted.to_dense().weight.detach()),
            "bias": (got.to_dense().bias.detach(), wanted.bias.detach()),
        }
        results |= {f"{i}.{name}": pair for name, pair in pairs.items()}
    return results


def eval_on_one_rank(rank):
    """In eval mode nothing waits for the other ranks."""
    model = small_model().eval()
    return model(batches()[0][0]) if rank == 0 else None


SCENARIOS = (
    duty_cycle,
    uneven_duty_cycle,
    duty_cycle_of_an_idle_rank,
    compiled_duty_cycle,
    ddp,
    large_ddp,
    large_compiled_ddp,
    compiled_ddp,
    checkpointed_ddp,
    fsdp,
    fsdp_state,
    eval_on_one_rank,
)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    results = {}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(rank)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every scenario has returned on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = [folder / f"{rank}.txt" for rank in range(RANKS)]
    ranks = []
    try:
        for rank in range(RANKS):
            with open(outputs[rank], "w") as output:
                command = [sys.executable, __file__, str(rank), str(folder)]
                ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = [rank.wait(SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * RANKS, "\n".join(o.read_text() for o in outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def of_each_rank(results, scenario):
    """What the scenario returned on each rank; fails with the traceback of a rank where it failed."""
    for rank, result in enumerate(results):
        if isinstance(result[scenario.__name__], str):
            pytest.fail(f"{scenario.__name__} on rank {rank}:\n{result[scenario.__name__]}")
    return [result[scenario.__name__] for result in results]


def assert_same_state(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, name)


@pytest.mark.parametrize("scenario", [duty_cycle, uneven_duty_cycle, duty_cycle_of_an_idle_rank])
def test_the_duty_cycle_is_that_of_the_global_batch(results, scenario):
    """Bit for bit, since wins are counted in integers."""
    wanted = forwards(k_winners_layers(), slice(None))
    for got in of_each_rank(results, scenario):
        for after, alone in zip(got, wanted, strict=True):
            assert_same_state(after, alone)
    assert wanted[-1]["plain.samples_seen"] == STEPS * B
    assert wanted[-1]["plain.duty_cycle"].unique().numel() > 3


def test_a_compiled_layer_shares_its_duty_cycle(results):
    wanted = forwards(k_winners_layers(), slice(None))[-1]
    for got in of_each_rank(results, compiled_duty_cycle):
        assert_same_state(got, wanted)


# The mean over ranks of means over halves against the mean over all: each of the STEPS steps' gradients is a sum of no
# more than B * 36 * 24 products in another order, times the learning rate; values are of about 1.
TRAINED = STEPS * B * 36 * 24 * 2.0**-53


@pytest.mark.parametrize("scenario", [ddp, compiled_ddp, checkpointed_ddp, fsdp])
def test_training_is_that_of_one_process_on_the_global_batch(results, scenario):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    wanted = train(model, model, slice(None))
    first, second = of_each_rank(results, scenario)
    assert_same_state(second, first)
    assert first.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point() and "duty_cycle" not in name:
            torch.testing.assert_close(
                first[name], value, rtol=0, atol=TRAINED, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert_same_bits(first[name], value, name)
    assert (wanted["5.weight"] - before["5.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("scenario", [large_ddp, large_compiled_ddp])
def test_all_ranks_have_the_supports_of_the_first(results, scenario):
    wanted = sk.densify_(large := large_layers(seed=1)) and large(large_rows()).detach()
    for got in of_each_rank(results, scenario):
        torch.testing.assert_close(got, wanted)


def test_a_sharded_layer_says_what_a_whole_one_does(results):
    for pairs in of_each_rank(results, fsdp_state):
        for name, (got, wanted) in pairs.items():
            assert_same_bits(got, wanted, name)


def test_eval_mode_waits_for_nobody(results):
    y, _ = of_each_rank(results, eval_on_one_rank)
    assert_same_bits(y.detach(), small_model().eval()(batches()[0][0]).detach(), "y")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
