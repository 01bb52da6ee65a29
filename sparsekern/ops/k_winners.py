"""The k-winners ops: schema, shapes, autograd, and the public functions (Algorithm 1, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import k_winners_reference as reference
from sparsekern.ops._library import define


def _k_winners_fake(x, k, duty_cycle, boost_strength, channels, inner):
    rows, n = x.shape
    winners = x.new_empty((rows, (n + 15) // 16 * 2), dtype=torch.uint8)
    return torch.empty_like(x), winners, x.new_empty((channels + 1,), dtype=torch.int64)


# Rows of n units in memory order, x contiguous. Unit u belongs to channel `u // inner % channels`, whose duty cycle
# boosts it and which its win is counted for: a plain layer has channels = n and inner = 1, (B, C, H, W) rows have
# channels = C and inner = H * W, channels-last rows channels = C and inner = 1. Ties go to the lowest index in
# channel-major order. `winners` has a bit a unit, `counts` the wins of each channel and, last, the number of rows.
define(
    "k_winners(Tensor x, int k, Tensor? duty_cycle, float boost_strength, int channels, int inner)"
    " -> (Tensor y, Tensor winners, Tensor counts)",
    reference=reference.k_winners,
    fake=_k_winners_fake,
)
define(
    "k_winners_backward(Tensor grad_y, Tensor winners) -> Tensor",
    reference=reference.k_winners_backward,
    fake=lambda grad_y, winners: torch.empty_like(grad_y),
)
define(
    "update_duty_cycle_(Tensor(a!) duty_cycle, Tensor(b!) samples_seen, Tensor counts, int period,"
    " int rows_per_sample, int locations) -> ()",
    reference=reference.update_duty_cycle_,
    fake=lambda duty_cycle, samples_seen, counts, period, rows_per_sample, locations: None,
)
