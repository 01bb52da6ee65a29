"""A progress bar on standard error, under which what is printed meanwhile stays readable."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def progress(items: list) -> Iterator[Iterator]:
    """Yields an iterator over the items that shows how far it has come, and at which item."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _named(items)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    # A redirected standard output keeps what is printed; on a terminal it is printed above the bar.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        yield _drawn(items, bar)


def _named(items):
    for i, item in enumerate(items, 1):
        print(f"{i}/{len(items)} {item}", file=sys.stderr)
        yield item


def _drawn(items, bar):
    task = bar.add_task("", total=len(items))
    for i, item in enumerate(items):
        bar.update(task, description=str(item), completed=i)
        yield item
