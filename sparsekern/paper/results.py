"""Result files: CSV under a line that says how it came about, written whole or not at all, with a SHA-256 beside."""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern.paper.checkpoint import beside, sync_folder, write_atomically, write_synced

FOLDER = Path("docs/results")


class DamagedResult(Exception):
    """A result file is not what was written; the message names the file and the damage."""


class ConfigurationMismatch(Exception):
    """Results of another configuration are in the way; the message says what differs."""


@dataclass
class Result:
    """What a result file holds.

    Attributes:
        configuration: everything that decides the rows' values.
        rows: a dictionary a row, of strings when it has been read from a file.
        environment: where they were measured.
    """

    configuration: dict
    rows: list[dict]
    environment: dict


def environment(device: str = "cpu") -> dict:
    """The hardware and versions that a measurement names."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparsekern": sk.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Its name, with family and model where Linux knows them: what a cloud calls it may be several generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    first = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    if "cpu family" not in first:
        return first.get("model name", platform.machine())
    return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of the checkout that a folder is in, with a + where its code has changes; empty where there is none."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # Result files and what is made from them may change: one run writes several.
        code = [":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)README.md"]
        status = [*git, "status", "--porcelain", "-uno", "--", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def write(path: Path, result: Result) -> None:
    """Writes a result file and its checksum, each either whole or not there."""
    buffer = io.StringIO()
    buffer.write("# " + json.dumps({"configuration": result.configuration, "environment": result.environment}) + "\n")
    writer = csv.DictWriter(buffer, list(result.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    write_checked(path, buffer.getvalue().encode())


def read(path: Path) -> Result:
    """The content of a result file.

    Raises:
        FileNotFoundError: there is none.
        DamagedResult: the file is not whole, or has no checksum.
    """
    first, _, table = read_checked(path).decode().partition("\n")
    try:
        header = json.loads(first.removeprefix("# "))
        rows = list(csv.DictReader(io.StringIO(table)))
        return Result(header["configuration"], rows, header["environment"])
    except (ValueError, KeyError) as error:
        raise DamagedResult(f"{path}: is no result file: {error}") from None


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file and ``NAME.sha256`` beside it, which ``sha256sum -c`` reads.

    Killed or out of space at any moment, the old content or the new is there whole: the new one lies as ``NAME.new`` on
    the disk before the checksum, whose renaming decides between the two.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = beside(path)
    with contextlib.suppress(FileNotFoundError, DamagedResult):
        read_checked(path)  # where a writer was killed, its content is moved out of the way first
    write_synced(new, content)
    write_atomically(_checksum_path(path), f"{_sha256(content)}  {path.name}\n".encode())
    sync_folder(path.parent)  # the two renames last in this order
    with contextlib.suppress(FileNotFoundError):  # a reader was faster
        os.replace(new, path)
    sync_folder(path.parent)


def read_checked(path: Path) -> bytes:
    """The content that the checksum is of, from ``NAME.new`` where its writer was killed before the last renaming.

    Raises:
        FileNotFoundError: there is none.
        DamagedResult: the file is not whole, or has no checksum.
    """
    new, checksum = beside(path), _checksum_path(path)
    wanted = checksum.read_text().split(" ")[0] if checksum.exists() else None
    content = path.read_bytes() if path.exists() else None
    if content is not None and _sha256(content) == wanted:
        return content
    if new.exists() and _sha256(newer := new.read_bytes()) == wanted:
        with contextlib.suppress(OSError):  # who may not write here can read all the same
            os.replace(new, path)
        return newer
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if wanted is None:
        raise DamagedResult(f"{path}: its checksum {checksum.name} is not there")
    found = _sha256(content)
    raise DamagedResult(f"{path}: wants SHA-256 {wanted[:12]}..., got {found[:12]}... of {len(content)} bytes")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_as(path: Path, configuration: dict, *, report=print) -> Result | None:
    """The result in a file; None where there is none, or a damaged one, which is reported.

    Raises:
        ConfigurationMismatch: the file holds the result of another configuration.
    """
    try:
        result = read(path)
    except FileNotFoundError:
        return None
    except DamagedResult as damage:
        report(f"{damage}; made anew")
        return None
    check_configuration(path, result.configuration, configuration)
    report(f"from {path}")
    return result


def made_once(
    path: Path,
    configuration: dict,
    make: Callable[[], list[dict]],
    *,
    device="cpu",
    report=print,
    outdated: Callable[[list[dict]], bool] = lambda rows: False,
) -> Result:
    """The result in a file, or, where there is none or a damaged one, what ``make`` returns, written there.

    Args:
        path: of the file.
        configuration: everything that decides the rows' values.
        make: returns the rows.
        device: that it computes on.
        report: called with a line of text about where the result comes from.
        outdated: whether rows from the file are to be made anew all the same.

    Raises:
        ConfigurationMismatch: the file holds the result of another configuration.
    """
    result = read_as(path, configuration, report=report)
    if result is None or outdated(result.rows):
        made_at = {"commit": commit(), "date": today()}
        write(path, Result(configuration, make(), {**environment(device), **made_at}))
        report(f"written to {path}")
        result = read(path)
    return result


def check_configuration(path: Path, there: dict, here: dict) -> None:
    """Raises ConfigurationMismatch where two configurations differ."""
    here = json.loads(json.dumps(here))  # as it is read back: lists for tuples
    there, here = flat(there), flat(here)
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        raise ConfigurationMismatch(
            f"{path} holds results of another configuration: "
            + ", ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing)
            + "; write to another folder, or remove them"
        )


def flat(configuration: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one: ``{"a": {"b": 1}}`` is ``{"a b": 1}``."""
    result = {}
    for name, value in configuration.items():
        result |= flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
    return result


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
