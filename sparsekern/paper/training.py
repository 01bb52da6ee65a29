"""One training run of one of the paper's networks, which a kill at any moment does not change the result of."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.paper import checkpoint, distributed, results
from sparsekern.paper.evaluate import correct_by_noise_level, validation_accuracy
from sparsekern.paper.networks import Network, build, place
from sparsekern.paper.plain import rezero_

LOG = "log.jsonl"


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run's result; a checkpoint only goes on under the one that it was made with."""

    network: Network
    seed: int = 42
    group_size: int = 1
    plain: bool = False
    dense: bool = False
    device: str = "cpu"

    @property
    def kind(self) -> str:
        return "plain" if self.plain else "dense" if self.dense else "sparse"

    @property
    def label(self) -> str:
        """The network's name, and in what it is not the paper's."""
        kind = "" if self.kind == "sparse" else f"-{self.kind}"
        group = f"-g{self.group_size}" if self.group_size > 1 else ""
        return self.network.name + kind + group

    def shared(self) -> dict:
        """What runs on other seeds and devices have in common with this one."""
        return {name: value for name, value in asdict(self).items() if name not in ("seed", "device")}

    def identity(self, data) -> dict:
        """As a run's files name it: the configuration and the data's checksum."""
        return {**asdict(self), "data": data.checksum}


class Run:
    """A run in a folder of its own: made anew, or taken up where its last checkpoint left it.

    The data order of an epoch depends on the seed and the epoch alone, and the checkpoint holds the generator's state, the
    optimizer's, the layers' and the position, so that a resumed run repeats what the killed one would have done.

    Args:
        configuration: of the run.
        data: such as :class:`sparsekern.paper.mnist.Mnist`.
        folder: of checkpoints and log; made if it is not there.
        device: of this rank; the configuration's by default.
        checkpoint_every: steps between checkpoints within an epoch; 0 for one after each epoch only.
        report: called with a line of text about a checkpoint that is taken up or damaged.

    Raises:
        results.ConfigurationMismatch: the folder holds a run of another configuration.
        checkpoint.DamagedCheckpoint: it holds checkpoints, and all are damaged.
    """

    def __init__(
        self, configuration: Configuration, data, folder: Path, *, device=None, checkpoint_every: int = 0, report=print
    ):
        self.configuration = configuration
        self.device = device or configuration.device
        self.network = network = configuration.network
        self.data = data
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self.identity = configuration.identity(data)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = checkpoint.load(self.folder, report=report, set_aside=distributed.rank() == 0)
        if state is not None:
            results.check_configuration(self.folder, state["identity"], self.identity)

        torch.manual_seed(configuration.seed)
        model = build(
            network, group_size=configuration.group_size, plain=configuration.plain, dense=configuration.dense
        )
        if distributed.world_size() > 1:
            distributed.with_global_batch_norm_(model)
        self.model = place(model, self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), network.lr, network.momentum, weight_decay=network.weight_decay, fused=True
        )
        if configuration.plain:
            self.optimizer.register_step_post_hook(lambda *_: rezero_(self.model))
        self.epoch = 0  # the one under way, or the next
        self.step = 0  # of that epoch: how many are done
        self.seconds = 0.0  # spent on them
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.history: list[dict] = []  # an entry an epoch: what the log holds
        if state is not None:
            self._restore(state)
            report(f"resuming after {self.epoch} epochs and {self.step} steps")
        self.forward = self.model
        if distributed.world_size() > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
            torch.manual_seed(self._seed("dropout", distributed.rank()))
        distributed.barrier()  # no rank writes while another one still reads
        self._write_log()

    def train(self, epochs: int, progress=lambda what, done, of: None) -> list[dict]:
        """Trains until that many epochs are done in all; returns the history, an entry an epoch."""
        while self.epoch < epochs:
            self._train_epoch(progress)
            self.history.append(self._entry(progress))
            sk.step_boost_strength(self.model)
            self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
            self.loss_sum.zero_()
            self._save()
            self._write_log()
        return self.history

    def write_result(self, path: Path) -> results.Result:
        """Writes what a finished run has to say, a row an epoch, for the tables."""
        environment = results.environment(self.device)
        rows = [_row(self.configuration, entry, environment) for entry in self.history]
        result = results.Result(self.identity, rows, environment)
        if distributed.rank() == 0:
            results.write(path, result)
        return result

    def _train_epoch(self, progress) -> None:
        batches = self._batches()
        for group in self.optimizer.param_groups:
            group["lr"] = self.network.lr * self.network.lr_factor**self.epoch
        self.model.train()
        started = time.perf_counter() - self.seconds
        while self.step < len(batches):
            self._train_step(batches[self.step])
            self.step += 1
            progress(f"epoch {self.epoch + 1}", self.step, len(batches))
            if self.checkpoint_every and self.step % self.checkpoint_every == 0:
                self.seconds = time.perf_counter() - started
                self._save()
        self.seconds = time.perf_counter() - started

    def _train_step(self, indices: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(self._seed("step", self.step))
        x, labels = self.data.batch(indices, distributed.share(len(indices)), generator)
        loss_sum = F.nll_loss(self.forward(x), labels, reduction="sum")
        self.optimizer.zero_grad(set_to_none=True)
        (loss_sum * (distributed.world_size() / len(indices))).backward()  # the ranks' gradients are averaged
        self.optimizer.step()
        self.loss_sum += loss_sum.detach()

    def _seed(self, what: str, index: int = 0) -> int:
        """Of what is drawn anew in each epoch: 32 bits, since PyTorch's CPU generator ignores all others."""
        drawn = f"{self.configuration.seed} {self.epoch} {what} {index}"
        return int.from_bytes(hashlib.blake2b(drawn.encode(), digest_size=4).digest(), "little")

    def _batches(self) -> tuple[torch.Tensor, ...]:
        """The epoch's batches of training indices."""
        generator = torch.Generator().manual_seed(self._seed("order"))
        order = torch.randperm(len(self.data), generator=generator).to(self.device)
        return order.split(self.network.first if self.epoch == 0 else self.network.batch)

    def _entry(self, progress) -> dict:
        started = time.perf_counter()
        correct = correct_by_noise_level(self.model, self.data, partial(progress, f"test {self.epoch + 1}"))
        samples = len(self.data.test_labels)
        chosen_by = {}
        if hasattr(self.data, "validation_batches"):
            chosen_by["validation_accuracy"] = validation_accuracy(
                self.model, self.data, partial(progress, f"validate {self.epoch + 1}")
            )
        return {
            "epoch": self.epoch + 1,
            "loss": float(distributed.summed(self.loss_sum)) / len(self.data),
            "test_accuracy": correct[0] / samples,
            **chosen_by,
            "noise_score": sum(correct),
            "correct": {f"{eta:.2f}": count for eta, count in zip(self.data.noise_levels, correct, strict=True)},
            "samples": samples,
            "entropy": _entropies(self.model),
            "train_seconds": round(self.seconds, 3),
            "test_seconds": round(time.perf_counter() - started, 3),
        }

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": distributed.summed(self.loss_sum),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
        }
        if self.device.startswith("cuda"):
            state["cuda_generator"] = torch.cuda.get_rng_state(self.device)
        if distributed.rank() == 0:
            checkpoint.save(self.folder, state)
        distributed.barrier()

    def _restore(self, state: dict) -> None:
        for name in ("epoch", "step", "seconds", "history"):
            setattr(self, name, state[name])
        if distributed.rank() == 0:  # it holds the sum of all
            self.loss_sum.copy_(state["loss_sum"])
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise results.ConfigurationMismatch(
                f"{self.folder} holds a run that another version of sparsekern began; go on with that one, or remove it "
                f"({error})"
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        if "cuda_generator" in state:
            torch.cuda.set_rng_state(state["cuda_generator"], self.device)

    def _write_log(self) -> None:
        """Writes the log anew from the history, so that it never holds a line too much or half a line."""
        if distributed.rank() > 0:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        checkpoint.write_atomically(self.folder / LOG, lines.encode())


def _entropies(model: nn.Module) -> dict[str, list[float]]:
    """The duty cycles' entropy and its maximum, in bits, of each k-winners layer."""
    return {
        name: [round(float(layer.entropy()), 3), round(layer.max_entropy(), 3)]
        for name, layer in model.named_modules()
        if isinstance(layer, (sk.KWinners, sk.KWinners2d))
    }


def best_epoch(history: list[dict]) -> dict:
    """The epoch or row that the paper's scores are read off: of the best validation, or else test, accuracy."""
    return max(history, key=lambda entry: float(entry.get("validation_accuracy") or entry["test_accuracy"]))


def _row(configuration: Configuration, entry: dict, environment: dict) -> dict:
    """An epoch as a row of a table."""
    row = {
        "run": configuration.label,
        "seed": configuration.seed,
        "epoch": entry["epoch"],
        "loss": f"{entry['loss']:.6f}",
        "validation_accuracy": entry.get("validation_accuracy", ""),
        "test_accuracy": entry["test_accuracy"],
        "noise_score": entry["noise_score"],
        "samples": entry["samples"],
    }
    row |= {f"correct {eta}": count for eta, count in entry["correct"].items()}
    for layer in ("winners1", "winners2", "winners"):
        entropy, most = entry["entropy"].get(layer, ("", ""))
        row |= {f"entropy {layer}": entropy, f"max entropy {layer}": most}
    seconds = {name: entry[name] for name in ("train_seconds", "test_seconds")}
    return row | seconds | {"device": environment["device"], "threads": environment["threads"]}
