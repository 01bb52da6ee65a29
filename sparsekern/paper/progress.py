"""Progress bars of everything that takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


def track(items: Iterable, description: str, console: Console) -> Iterator:
    """Goes through items under a progress bar."""
    with progress_bar(console) as bar:
        yield from bar.track(list(items), description=description)
