"""``sweep``: the runs of whole tables by Snakemake, several at a time, on this machine or a cluster."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from sparsekern.paper import options
from sparsekern.paper.scores import COMMANDS, FAST_LAYOUT
from sparsekern.paper.train import RUNS

HELP = "train a table's networks on all seeds, several at a time (Snakemake)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="+", choices=COMMANDS, metavar="TABLE", help=", ".join(COMMANDS))
    parser.add_argument("--seeds", type=options.seeds, metavar="A-B", help="by default each table's own")
    parser.add_argument(
        "--jobs",
        type=options.at_least(1),
        default=os.cpu_count(),
        metavar="N",
        help="runs at a time, on a cluster too (default: as many as this machine has cores)",
    )
    parser.add_argument("--threads", type=options.at_least(1), default=1, metavar="N", help="of a run (default: 1)")
    parser.add_argument(
        "--group-size", type=options.at_least(1), default=FAST_LAYOUT, metavar="G", help="beside 1 (default: 16)"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--snakemake",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="the rest goes to Snakemake: --executor slurm, which wants the plugin snakemake-executor-plugin-slurm, sends "
        "the runs to a cluster whose nodes share this folder and the data",
    )


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("snakemake") is None:
        raise ValueError("wants Snakemake; run: pip install -e '.[paper,sweep]' in a checkout")
    return subprocess.run(snakemake_command(arguments)).returncode


def snakemake_command(arguments: argparse.Namespace) -> list[str]:
    config = {
        "tables": arguments.tables,
        "seeds": arguments.seeds or [],  # each table's own
        "runs": str(arguments.runs),
        "group_size": arguments.group_size,
        "device": arguments.device,
        "threads": arguments.threads,
        "options": ["--data", str(arguments.data)] if arguments.data else [],
    }
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))),
        *("--config", *(f"{name}={json.dumps(value)}" for name, value in config.items())),
        *("--cores", str(arguments.jobs * arguments.threads)),  # of this machine
        *("--jobs", str(arguments.jobs)),  # of a cluster
        "--keep-going",  # one failed run does not stop the others
        "--rerun-incomplete",  # a killed sweep goes on; a run's file is only there once it is whole
        "--nolock",  # which a killed sweep would leave behind
        *("--rerun-triggers", "mtime"),  # the runs compare configurations themselves
        *arguments.snakemake,
    ]
