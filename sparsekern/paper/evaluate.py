"""Test scores at every noise level (section 4)."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.paper import distributed

BATCH = 250  # as fast as smaller ones; 1000, whose feature maps leave the cache, takes 1.5 times as long on a CPU


def correct_by_noise_level(model: nn.Module, data, progress=lambda done, of: None) -> list[int]:
    """How many test samples the model gets right at each of ``data.noise_levels``, the first of which is no noise.

    Args:
        model: gives a score for each class; put into eval mode.
        data: such as :class:`sparsekern.paper.mnist.Mnist`.
        progress: called after each level with the number of levels done, and of all.
    """
    model.eval()
    counts = []
    for eta in data.noise_levels:
        counts.append(_correct(model, data.test_batches(eta, BATCH))[0])
        progress(len(counts), len(data.noise_levels))
    return counts


def validation_accuracy(model: nn.Module, data, progress=lambda done, of: None) -> float:
    """The accuracy that the best epoch is chosen by, of data with ``validation_batches``; progress as above."""
    model.eval()
    progress(0, 1)
    correct, samples = _correct(model, data.validation_batches(BATCH))
    progress(1, 1)
    return correct / samples


@torch.inference_mode()
def _correct(model: nn.Module, batches) -> tuple[int, int]:
    """How many samples of all ranks the model gets right, and of how many."""
    correct = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    samples = 0
    for i, (x, labels) in enumerate(batches):
        samples += len(labels)
        if i % distributed.world_size() == distributed.rank():
            correct += (model(x).argmax(1) == labels).sum()
    return int(distributed.summed(correct)), samples
