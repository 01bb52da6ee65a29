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
    current, new = folder / NAME, folder / (NAME + ".new")
    _write_synced(new, header, payload)
    if current.exists():
        os.replace(current, folder / PREVIOUS)  # killed here, load goes on from the previous one
    os.replace(new, current)
    _sync_folder(folder)


def load(folder: Path, *, report=print) -> dict | None:
    """The newest checkpoint that is whole; None where there is none.

    A damaged one is reported and set aside as ``NAME.damaged``, so that it never takes the place of the good one.

    Raises:
        DamagedCheckpoint: there are checkpoints, and all are damaged.
    """
    problems = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = read(path)
        except DamagedCheckpoint as damage:
            problems.append(str(damage))
            continue
        if problems:
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
    beside = path.with_name(path.name + ".new")
    _write_synced(beside, content)
    os.replace(beside, path)


def _write_synced(path: Path, *parts) -> None:
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # makes the renames last through a power cut
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
