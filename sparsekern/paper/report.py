"""``report``: docs/results.md, every table and figure there are results for, with its command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparsekern.paper import batchnorm, entropy, figure2, figure3, figure5, results, speed, table3
from sparsekern.paper.checkpoint import write_atomically
from sparsekern.paper.progress import console
from sparsekern.paper.scores import COMMANDS
from sparsekern.paper.tables import Table

HELP = "docs/results.md from the result files"
SECTIONS = {**COMMANDS, "batchnorm": batchnorm, "figure5": figure5, "entropy": entropy, "speed": speed,
            "figure2": figure2.COMMAND, "figure3": figure3.COMMAND, "table3": table3}  # fmt: skip
BEGINNING = """# The paper's results, reproduced

Written by `python -m sparsekern.paper report` from the result files in `{folder}`. Each of them begins with the
configuration and the machine that it comes from, and has its SHA-256 beside it. Each section names the command that made
its file; where the file is there, the command prints and draws from it.

To train everything anew in a checkout (which discards the committed results), several runs at a time, and then gather,
print and draw it:

    pip install -e '.[paper,sweep]'
    rm -r {folder}
    python -m sparsekern.paper sweep table1 table2 gaussian
    for command in table1 table2 gaussian batchnorm figure5 entropy speed figure2 figure3 report; do
        python -m sparsekern.paper $command
    done

The data are looked for in `data/mnist` and `data/speech_commands`; `--data DIR` names another folder, and `--download`
fetches what is not there (of speech, the whole data set); `sweep` alone does not take it.

A sweep that was stopped goes on by the same command; `--seeds 42-44` trains fewer seeds, and later the others. On a cluster
whose nodes share the checkout and the data, Snakemake submits the runs, here 90 at a time:

    pip install snakemake-executor-plugin-slurm
    python -m sparsekern.paper sweep table1 --jobs 90 --data /shared/mnist --snakemake --executor slurm

One run alone, which the same command resumes bit for bit, and the same shared by two processes:

    python -m sparsekern.paper train sparseCNN2 --seed 42
    torchrun --nproc-per-node 2 -m sparsekern.paper train sparseCNN2 --seed 42

Where the runs differ from the authors' code: the hidden layer's supports are dealt so that every input is used about
equally often (there each unit drew its own independently); the duty cycle counts the winners (there the winners above 0);
the batches of the speech networks are permutations of the clips (there drawn with replacement, each class equally often).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results.md"), metavar="FILE", help="default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    out = console()
    write_atomically(arguments.out, document(arguments.results, arguments.out.parent, out.print).encode())
    out.print(f"written to {arguments.out}")
    return 0


def document(folder: Path, beside: Path, report=print) -> str:
    """The whole text.

    Args:
        folder: of the results.
        beside: the folder that the document's links start from.
        report: called with what is left out.
    """
    parts = [BEGINNING.format(folder=folder)]
    for name, command in SECTIONS.items():
        try:
            shown = command.show(folder)
        except FileNotFoundError as error:
            report(f"{name}: left out, there is no {error.filename}")
            continue
        if shown:
            parts += [f"## {command.HELP[0].upper() + command.HELP[1:]}", f"`python -m sparsekern.paper {name}`"]
            parts += [_markdown(part, beside) for part in shown]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _markdown(part: Table | Path | str, beside: Path) -> str:
    if isinstance(part, Path):
        png, svg = (os.path.relpath(part.with_suffix(suffix), beside) for suffix in (".png", ".svg"))
        return f"![{part.stem}]({png})\n\n[{part.stem}.svg]({svg})"
    return part.markdown() if isinstance(part, Table) else part
