"""Test scores at every noise level (section 4)."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.paper import distributed


def correct_by_noise_level(model: nn.Module, data, *, batch_size: int = 250, progress=lambda: None) -> list[int]:
    """How many test samples the model gets right at each of ``data.noise_levels``, the first of which is no noise.

    Args:
        model: gives a score for each class; put into eval mode.
        data: such as :class:`sparsekern.paper.mnist.Mnist`.
        batch_size: of the forward passes.
        progress: called after each level.
    """
    model.eval()
    counts = []
    for eta in data.noise_levels:
        counts.append(_correct(model, data.test_batches(eta, batch_size)))
        progress()
    return counts


def validation_accuracy(model: nn.Module, data, *, batch_size: int = 250) -> float:
    """The accuracy that the best epoch is chosen by, of data with ``validation_batches``."""
    model.eval()
    samples = sum(len(labels) for _, labels in data.validation_batches(batch_size))
    return _correct(model, data.validation_batches(batch_size)) / samples


@torch.inference_mode()
def _correct(model: nn.Module, batches) -> int:
    correct = torch.zeros((), dtype=torch.int64)
    for i, (x, labels) in enumerate(batches):
        if i % distributed.world_size() == distributed.rank():
            correct = correct + (model(x).argmax(1) == labels).sum().to(correct)
    return int(distributed.summed(correct))
