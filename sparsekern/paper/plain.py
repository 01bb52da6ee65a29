"""The paper's layers as a good PyTorch user would write them, to compare with: ``topk``, and masks on dense weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsekern as sk


class PlainKWinners(sk.KWinners):
    """Algorithm 1 and equation 6 in torch operations; the buffers, and so the state_dict, of ``sk.KWinners``."""

    def forward(self, x: Tensor) -> Tensor:  # (B, N)
        winners = _winners(x * self._boost(self.n), self._k(self.n)).to(x.dtype)
        if self.training:
            self._move_duty_cycle(winners.mean(0), len(x))
        return x * winners

    def _boost(self, n: int) -> Tensor:
        return torch.exp(self.boost_strength * (self._k(n) / n - self.duty_cycle))

    @torch.no_grad()
    def _move_duty_cycle(self, rate: Tensor, samples: int) -> None:
        self.samples_seen += samples
        period = self.samples_seen.clamp(max=self.duty_cycle_period).clamp(min=samples)
        self.duty_cycle.lerp_(rate.float(), samples / period)


class PlainKWinners2d(sk.KWinners2d):
    """The same over whole feature maps, the duty cycle kept per channel."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        self._units = x[0].numel()
        boosted = (x * self._boost(self._units).view(1, -1, 1, 1)).movedim(1, -1)  # no copy where x is channels-last
        winners = _winners(boosted.flatten(1), self._k(self._units)).view(boosted.shape).movedim(-1, 1).to(x.dtype)
        if self.training:
            self._move_duty_cycle(winners.mean((0, 2, 3)), len(x))
        return x * winners

    _boost = PlainKWinners._boost
    _move_duty_cycle = PlainKWinners._move_duty_cycle


def _winners(boosted: Tensor, k: int) -> Tensor:
    """1 at the k largest of each row, 0 elsewhere."""  # (B, N) -> (B, N)
    indices = boosted.detach().topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(boosted).scatter_(1, indices, 1)


@torch.no_grad()
def plain_(model: nn.Sequential) -> nn.Sequential:
    """Swaps a network's sparse linear layers and convolutions for dense ones with the same weights, in place.

    A linear layer keeps its support as ``mask``: call :func:`rezero_` after each step.
    """
    for name, layer in model.named_children():
        if isinstance(layer, (sk.SparseLinear, sk.SparseConv2d)):
            setattr(model, name, layer.to_dense())
        if isinstance(layer, sk.SparseLinear):
            model.get_submodule(name).register_buffer("mask", layer.mask)
    return model


@torch.no_grad()
def rezero_(model: nn.Module) -> None:
    """Sets the weights that do not exist back to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "mask"):
            module.weight.mul_(module.mask)
