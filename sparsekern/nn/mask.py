"""How the random supports of sparse layers are drawn, and how a given mask is stored (section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_supports(in_features: int, groups: int, fan_in: int) -> Tensor:
    """Random supports, ``fan_in`` different inputs for each group, balanced: int64 (groups, fan_in).

    The groups are dealt from a stack of shuffled decks of all inputs, so each input serves ``groups * fan_in /
    in_features`` groups, rounded up or down: the kernels' inner loops then have a nearly constant length. A group that
    straddles two decks takes its second part from the cards it does not hold yet. The groups are then shuffled. Drawn
    from torch's default generator.
    """
    total, device = groups * fan_in, "cpu"  # whatever the default device is
    stream = torch.empty(total + in_features, dtype=torch.int64, device=device)
    dealt = 0
    while dealt < total:
        deck = torch.randperm(in_features, device=device)
        held = dealt % fan_in  # cards that the straddling group holds of the last deck
        if held:
            fresh = torch.ones(in_features, dtype=torch.bool, device=device)
            fresh[stream[dealt - held : dealt]] = False
            is_fresh = fresh[deck]
            fresh_cards, held_cards = deck[is_fresh], deck[~is_fresh]
            need = fan_in - held
            rest = torch.cat([fresh_cards[need:], held_cards])
            deck = torch.cat([fresh_cards[:need], rest[torch.randperm(len(rest), device=device)]])
        stream[dealt : dealt + in_features] = deck
        dealt += in_features
    return stream[:total].view(groups, fan_in)[torch.randperm(groups, device=device)]


def supports_to_indices(supports: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The (ccol_indices, row_indices) of supports (groups, fan_in): int32 (in_features + 1,) and (blocks,)."""
    fan_in = supports.shape[1]
    inputs = supports.flatten()
    # A stable sort by input keeps the groups of each input ascending.
    order = torch.argsort(inputs, stable=True)
    counts = torch.bincount(inputs, minlength=in_features)
    return _pointers(counts), (order // fan_in).int()


def mask_to_indices(mask: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The (ccol_indices, row_indices) of a bool mask (O, I) whose groups of rows are alike."""
    out_features = mask.shape[0]
    first = mask[::group_size]
    same = first.repeat_interleave(group_size, 0)[:out_features] == mask
    if not same.all():
        row = int((~same.all(1)).nonzero()[0])
        raise ValueError(
            f"SparseLinear.from_dense: wants a mask whose rows are alike within each group of {group_size}, "
            f"got row {row} different from row {row // group_size * group_size}"
        )
    inputs, groups = first.t().nonzero(as_tuple=True)
    return _pointers(torch.bincount(inputs, minlength=mask.shape[1])), groups.int()


def magnitude_mask(weight: Tensor, fan_in: int, group_size: int) -> Tensor:
    """The ``fan_in`` inputs of largest magnitude (Euclidean norm over a group) of each group: bool (O, I)."""
    out_features = weight.shape[0]
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -out_features % group_size))
    norms = padded.view(-1, group_size, weight.shape[1]).double().norm(dim=1)
    chosen = torch.zeros_like(norms, dtype=torch.bool)
    chosen.scatter_(1, torch.sort(norms, dim=1, descending=True, stable=True).indices[:, :fan_in], True)
    return chosen.repeat_interleave(group_size, 0)[:out_features]


def _pointers(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
