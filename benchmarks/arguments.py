"""Types of command-line arguments that several of the benchmarks share, and what they say where nothing can be run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch


def pattern(text: str) -> re.Pattern:
    """For --only: a regular expression that ignores case."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None


ONLY = {
    "type": pattern,
    "default": re.compile(""),
    "metavar": "PATTERN",
    "help": "rows in whose name this is found: a regular expression that ignores case (default: all)",
}


def device(text: str) -> str:
    """A device by a name that PyTorch knows."""
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"wants cpu, cuda or cuda:N, got {text!r}") from None
    return text


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not smaller."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"wants at least {least}, got {value}")
        return value

    return number


def nothing_to_run(program: str, only: re.Pattern, names: list) -> bool:
    """Whether no name matched, which is then said."""
    if not names:
        print(f"{program}: no row matches {only.pattern!r}", file=sys.stderr)
    return not names


def no_gpu(program: str, device: str) -> bool:
    """Whether the device is a GPU that is not there, which is then said."""
    missing = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    if missing:
        print(f"{program}: no GPU that PyTorch can use; --device cpu runs without one", file=sys.stderr)
    return missing
