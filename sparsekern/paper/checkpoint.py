"""Checkpoints that survive a kill at any moment: written beside, synced, renamed, and checked when they are read."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAGIC = (
    b"sparsekern checkpoint 1\n"  # then the SHA-256 of the rest, in hexadecimal, a newline, and what torch.save wrote
)
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


class DamagedCheckpoint(Exception):
    """A checkpoint file is not what was written; the message names the file and the damage."""


def save(folder: Path, state: dict) -> None:
    """Writes a checkpoint; the one before it stays as the previous one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    current = folder / NAME
    new = beside(current)
    write_synced(new, header, payload)
    if current.exists():
        os.replace(current, folder / PREVIOUS)  # killed here, load goes on from the previous one
    os.replace(new, current)
    sync_folder(folder)


def load(folder: Path, *, report=print, set_aside: bool = True) -> dict | None:
    """The newest checkpoint that is whole; None where there is none.

    A damaged one is reported and set aside as ``NAME.damaged``, so that it never takes the place of the good one.

    Args:
        folder: of the run.
        report: called with a line of text about a damaged one.
        set_aside: of several processes that load at a time, one may rename.

    Raises:
        DamagedCheckpoint: there are checkpoints, and all are damaged.
    """
    problems = []
    for name in (NAME, PREVIOUS):
        try:
            state = read(folder / name)
        except FileNotFoundError:  # or set aside by another process
            continue
        except DamagedCheckpoint as damage:
            problems.append(str(damage))
            continue
        if problems and set_aside:
            os.replace(folder / NAME, folder / (NAME + ".damaged"))
            report(f"{problems[0]}; set aside as {NAME}.damaged, going on from {name}")
        return state
    if problems:
        raise DamagedCheckpoint("; ".join(problems) + "; no good checkpoint is left: remove them to start anew")
    return None


def read(path: Path) -> dict:
    """The state in one checkpoint file.

    Raises:
        DamagedCheckpoint: the file is not whole.
    """
    data = memoryview(path.read_bytes())
    start = len(MAGIC) + 65
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise DamagedCheckpoint(f"{path}: is no checkpoint, or has lost its beginning ({len(data)} bytes)")
    wanted = bytes(data[len(MAGIC) : start - 1]).decode(errors="replace")
    found = hashlib.sha256(data[start:]).hexdigest()
    if found != wanted:
        raise DamagedCheckpoint(f"{path}: wants SHA-256 {wanted[:12]}..., got {found[:12]}... of {len(data)} bytes")
    return torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder, which is made, until the block or the process ends.

    Raises:
        BlockingIOError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is training in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either whole or not there under its name."""
    write_synced(beside(path), content)
    os.replace(beside(path), path)


def beside(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(path.name + ".new")


def write_synced(path: Path, *parts) -> None:
    """Writes a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder last through a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
