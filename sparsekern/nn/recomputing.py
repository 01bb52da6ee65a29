"""Activation checkpointing, under which a k-winners layer runs a forward twice and is to choose the same winners."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, is_grad_enabled

# How many forwards under activation checkpointing are remembered. The bound only matters where more of them than this wait
# for their backward.
REMEMBERED = 64


def recomputing() -> bool:
    """Whether this forward is activation checkpointing's second one: the autograd engine is running."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_recompute() -> bool:
    """Whether this forward may be run again in the backward pass: under checkpointing, reentrant or not."""
    if is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return False
    if torch.is_inference_mode_enabled():  # no backward pass
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def _fingerprint(x: Tensor) -> Tensor:
    """A sum over the bits of x, int64 (): exact, so that the same numbers give it again in any layout."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().view(integer).sum(dtype=torch.int64)


class Forwards:
    """The duty cycles that checkpointed forwards have met, for their recomputations to meet again.

    Recomputations may come in any order (several forwards before the first backward, a layer used twice in a segment,
    a graph that is kept and run again), so each is recognised by its input. No value is read by the host, so that
    nothing waits for a GPU.
    """

    def __init__(self):
        self._inputs: deque[Tensor] = deque(maxlen=REMEMBERED)
        self._duty_cycles: deque[Tensor] = deque(maxlen=REMEMBERED)
        self._recomputed: deque[Tensor] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._inputs)

    def __reduce__(self):
        return Forwards, ()  # a copy and a pickled layer have no forward of their own to recompute

    def remember(self, x: Tensor, duty_cycle: Tensor) -> None:
        key = _fingerprint(x)
        self._inputs.append(key)
        self._duty_cycles.append(duty_cycle.clone())
        self._recomputed.append(torch.zeros_like(key))

    def duty_cycle(self, x: Tensor) -> Tensor:
        """That of the last forward on x, among those of equal inputs of the last that was not recomputed yet."""
        n = len(self)
        same, recomputed = torch.stack(list(self._inputs)) == _fingerprint(x), torch.stack(list(self._recomputed))
        rank = same * (2 * n) + (1 - recomputed) * n + torch.arange(n, device=x.device)
        last = rank.argmax()
        recomputed[last] = 1
        self._recomputed = deque(recomputed.unbind(), maxlen=REMEMBERED)
        return torch.stack(list(self._duty_cycles)).index_select(0, last.view(1)).squeeze(0)
