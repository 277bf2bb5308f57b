"""`python -m eval.compare RUN RUN ...`: finished runs side by side, as a page, tables, plots and plain numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Compare finished runs: a table of what was measured, paired significance tests, and the best trade-offs of quality
against memory, speed and disk. Writes comparison.html (self-contained), .md, .csv, .json, .tex and PNG plots."""

EXAMPLES = """\
examples:
  python -m eval.compare runs/nf4_para runs/gptq_lora
  python -m eval.compare runs/sweep/* --output comparison --against nf4_para
  python -m eval.compare runs/nf4_para runs/gptq_lora --stages all"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return execute(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments, shared with `compress-peft compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--stages",
        default="last",
        metavar="WHICH",
        help='"last": each run\'s last stage, and the original model once (default); "all"; or a stage\'s name',
    )
    parser.add_argument("--against", metavar="ROW", help="the row that the others are tested against (default: first)")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), metavar="DIR", help="where to write (default: comparison)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Compare with parsed arguments; user errors become a message and exit code 2."""
    from compress_peft.errors import UserError  # imports torch: after the arguments are known to be right
    from eval.comparison import compare_runs, read_runs, run_labels
    from eval.comparison_page import write_comparison

    try:
        reports = read_runs(arguments.runs)
        comparison = compare_runs(
            reports, run_labels(arguments.runs), stages=arguments.stages, against=arguments.against
        )
        page = write_comparison(comparison, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((arguments.output / "comparison.md").read_text(encoding="utf-8"))
    print(f"comparison: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
