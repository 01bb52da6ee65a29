"""Training under ``torchrun``: the ranks share each global batch, and train what one process would on the whole of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the ranks that ``torchrun`` started, if it did; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def share(items: int) -> slice:
    """This rank's part of a global batch, of which the ranks' shares differ by at most one."""
    return slice(rank() * items // world_size(), (rank() + 1) * items // world_size())


def summed(t: Tensor) -> Tensor:
    """The sum over the ranks."""
    t = t.clone()
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


class _Sum(torch.autograd.Function):
    """The sum over the ranks, of values and of gradients: each rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        return summed(t)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return summed(grad)


class GlobalBatchNorm(nn.Module):
    """Batch normalisation without learned scale and shift by the statistics of the global batch, on any device.

    The state_dict is that of ``nn.BatchNorm1d`` and ``nn.BatchNorm2d``.
    """

    def __init__(self, local: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.momentum, self.eps = local.momentum, local.eps
        for name, buffer in local.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:  # (B, C) or (B, C, H, W)
        shape = (1, -1, *[1] * (x.dim() - 2))
        if not self.training:
            scale = (self.running_var + self.eps).rsqrt()
            return (x - self.running_mean.view(shape)) * scale.view(shape)
        others = [d for d in range(x.dim()) if d != 1]
        count = summed(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = _Sum.apply(x.sum(others)) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt().view(shape)


def with_global_batch_norm_(model: nn.Sequential) -> nn.Sequential:
    """Makes a model's batch normalisation see the global batch, in place."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(parent, name, GlobalBatchNorm(layer))
    return model
