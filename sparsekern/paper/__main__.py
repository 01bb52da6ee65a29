"""``python -m sparsekern.paper COMMAND``: one command for each table and figure of the paper."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
except ImportError:
    sys.exit("sparsekern.paper: wants rich and matplotlib; run: pip install -e '.[paper]' in a checkout")

from sparsekern.paper import report, sweep, train
from sparsekern.paper.checkpoint import DamagedCheckpoint
from sparsekern.paper.results import ConfigurationMismatch, DamagedResult

COMMANDS = {"train": train, "sweep": sweep, **report.SECTIONS, "report": report}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparsekern.paper", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except FileNotFoundError as error:
        print(f"{parser.prog} {arguments.command}: {_missing(error, parser.prog)}", file=sys.stderr)
        return 1
    except (OSError, ValueError, ConfigurationMismatch, DamagedCheckpoint, DamagedResult) as error:
        print(f"{parser.prog} {arguments.command}: {error}", file=sys.stderr)
        return 1


def _missing(error: FileNotFoundError, prog: str) -> str:
    maker = Path(error.filename or "").stem
    return f"there is no {error.filename}; `{prog} {maker}` makes it" if maker in COMMANDS else str(error)


if __name__ == "__main__":
    sys.exit(main())
