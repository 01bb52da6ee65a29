"""Fetching public files: checked, resumed where a transfer broke off, and never half there under their own name."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 16
TRIES = 3  # of each mirror, as long as none of them brings anything new
Progress = Callable[[int, int | None], None]


def digest(path: Path, algorithm: str) -> str:
    """A file's checksum, in hexadecimal."""
    found = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def download(urls: Sequence[str], path: Path, checksum: str, progress: Progress = lambda size, whole: None):
    """Fetches a file from the first mirror that has it whole.

    What has arrived stays beside it as ``NAME.part``, which the next attempt goes on from.

    Args:
        urls: the same file on several mirrors, in the order to try them.
        path: where it goes; its folder is made.
        checksum: its MD5 or SHA-256, in hexadecimal.
        progress: called with the number of bytes that are there, and of the whole, None where it is not known.

    Raises:
        OSError: no mirror had the file, whole and with this checksum; the message says what each answered.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    algorithm = {32: "MD5", 64: "SHA-256"}[len(checksum)]
    problems = []
    for url in urls:
        problem = _fetch_stubbornly(url, part, progress)
        if problem is None:
            found = digest(part, algorithm.lower().replace("-", ""))
            if found == checksum:
                os.replace(part, path)
                return
            part.unlink()
            problem = f"wants {algorithm} {checksum}, got {found}"
        problems.append(f"  {url}: {problem}")
    raise OSError(f"{path.name}: no mirror had it:\n" + "\n".join(problems))


def _fetch_stubbornly(url: str, part: Path, progress) -> str | None:
    """Fetches what is missing of part; None once it is whole, else why it is not."""
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, before, progress)
            return None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            gained = part.exists() and part.stat().st_size > before
            tries = 0 if gained else tries + 1
            answered = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if answered or tries == TRIES:
                return str(error) or type(error).__name__


def _fetch(url: str, part: Path, before: int, progress) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and before:
            return  # nothing is missing, or too much is there: the checksum tells
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        size = before if resumed else 0  # a server without ranges sends everything again
        length = response.headers.get("Content-Length")
        whole = None if length is None else size + int(length)
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                size += len(chunk)
                progress(size, whole)
    if whole is not None and size < whole:
        raise OSError(f"broke off after {size} of {whole} bytes")
