"""Progress bars of everything that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


@contextmanager
def bytes_bar(description: str, console: Console) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of a transfer; yields what to call with the number of bytes done, and of all."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def track(items: Iterable, description: str, console: Console) -> Iterator:
    """Goes through items under a progress bar."""
    with progress_bar(console) as bar:
        yield from bar.track(list(items), description=description)
