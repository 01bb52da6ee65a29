"""Test scores at every noise level (section 4)."""

from __future__ import annotations

import torch
from torch import nn


@torch.inference_mode()
def correct_by_noise_level(model: nn.Module, data, *, batch_size: int = 1000, progress=lambda: None) -> list[int]:
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
        correct = sum((model(x).argmax(1) == labels).sum() for x, labels in data.test_batches(eta, batch_size))
        counts.append(int(correct))
        progress()
    return counts
