"""Write report.md and report.html of a run folder again, from its report.json."""

from __future__ import annotations

import argparse
import sys

from compress_peft.errors import UserError
from pipelines.report import render


def main(argv: list[str] | None = None) -> int:
    """0 done, 2 the folder holds no readable report."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.report", description=__doc__)
    parser.add_argument("folder", help="folder of a finished run")
    arguments = parser.parse_args(argv)
    try:
        print(f"report: {render(arguments.folder)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
