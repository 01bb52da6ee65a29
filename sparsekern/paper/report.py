"""``report``: docs/results.md, every table and figure there are results for, with its command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparsekern.paper import entropy, figure2, figure3, figure5, results, speed, table3
from sparsekern.paper.checkpoint import write_atomically
from sparsekern.paper.progress import console
from sparsekern.paper.scores import COMMANDS
from sparsekern.paper.tables import Table

HELP = "docs/results.md from the result files"
SECTIONS = {**COMMANDS, "figure5": figure5, "entropy": entropy, "speed": speed, "figure2": figure2, "figure3": figure3,
            "table3": table3}  # fmt: skip
BEGINNING = """# The paper's results, reproduced

Written by `python -m sparsekern.paper report` from the result files in `{folder}`, each of which begins with the
configuration and the machine that it comes from and has its SHA-256 beside it. Each section names the command that makes
its file, or, where the file is there, only prints it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results.md"), metavar="FILE", help="default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    out = console()
    parts = [BEGINNING.format(folder=arguments.results)]
    for name, command in SECTIONS.items():
        try:
            shown = command.show(arguments.results)
        except FileNotFoundError as error:
            out.print(f"{name}: left out, there is no {error.filename}")
            continue
        title = command.HELP[0].upper() + command.HELP[1:]
        parts += [
            f"## {title}",
            f"`python -m sparsekern.paper {name}`",
            *(_markdown(part, arguments.out) for part in shown),
        ]
    write_atomically(arguments.out, ("\n\n".join(part.strip() for part in parts) + "\n").encode())
    out.print(f"written to {arguments.out}")
    return 0


def _markdown(part: Table | Path, document: Path) -> str:
    if isinstance(part, Table):
        return part.markdown()
    return f"![{part.stem}]({os.path.relpath(part, document.parent)})"
