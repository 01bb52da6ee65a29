"""How the commands' options are read, and what is said of a value that is none."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

import torch


def at_least(low: int) -> Callable[[str], int]:
    """A reader of integers from low on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise ArgumentTypeError(f"wants an integer of at least {low}, got {text!r}")
        return value

    return read


def seeds(text: str) -> list[int]:
    """``42-44,50`` is 42, 43, 44, 50."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            seeds = range(int(first), int(last or first) + 1)
        except ValueError:
            seeds = range(0)
        if not seeds:
            raise ArgumentTypeError(f"wants seeds such as 42-44,50, got {text!r}")
        found += seeds
    return found


def device(text: str) -> str:
    """A device that is there."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"wants cpu, cuda or cuda:N, got {text!r}")
    if kind == "cuda" and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"wants a device that is there, got {text!r} and {torch.cuda.device_count()} GPUs")
    return text
