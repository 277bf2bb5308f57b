"""`python -m pipelines.sweep SWEEP.yaml`: a grid of variants of one recipe, what they share computed once.

The file is described in pipelines/grid.py. Every combination is a run of its own, in its own folder, that can be looked
at, resumed and compared like any other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.run import EXIT_DONE, EXIT_USER

DESCRIPTION = """\
Run every combination of a grid of settings. Runs that begin with the same steps share them: a model is quantized once
and ten adapters are attached to it. A killed sweep goes on with --resume. At the end one page compares all runs.

exit codes: 0 all done; 2 a run was refused or failed (the others are done); 1 a bug"""

EXAMPLES = """\
examples:
  python -m pipelines.sweep configs/sweeps/quantizers_x_adapters.yaml --dry-run
  python -m pipelines.sweep configs/sweeps/quantizers_x_adapters.yaml --output runs/grid --resume
  python -m pipelines.sweep configs/smollm2_135m_nf4_para.yaml --grid seed=0,1,2 --grid steps.1.adapter.r=4,12"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.sweep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return execute(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments, shared with `compress-peft sweep`."""
    parser.add_argument("config", type=Path, metavar="SWEEP", help="a sweep file, or a recipe with --grid")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="vary one key of the recipe (repeatable): seed=0,1,2",
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key in every run"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, what they share, and what is missing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/NAME)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each on a GPU of its own where there are any",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the sweep in this folder")
    existing.add_argument("--overwrite", action="store_true", help="delete the earlier runs of this sweep first")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {number}")
    return number


def execute(arguments: argparse.Namespace) -> int:
    """Sweep with parsed arguments; user errors become a message and exit code 2."""
    from compress_peft.errors import UserError

    try:
        return _execute(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
    return EXIT_USER


def _execute(arguments: argparse.Namespace) -> int:
    from compress_peft.errors import MissingRequirement
    from pipelines.grid import check, expand, listing, read_sweep
    from pipelines.sweeper import run_sweep

    base, axes, name = read_sweep(arguments.config, arguments.grid)
    folder = arguments.output or Path("runs") / name
    variants = expand(base, axes, arguments.overrides, folder)
    missing = check(variants)
    print("\n".join(listing(variants)), flush=True)
    if arguments.dry_run:
        print("\n".join(f"missing  {problem}" for problem in missing) or "ready to run")
        return EXIT_DONE
    if missing:
        raise MissingRequirement(missing)
    outcome = run_sweep(
        variants, folder, resume=arguments.resume, overwrite=arguments.overwrite, workers=arguments.workers
    )
    if outcome.page is not None:
        print(f"comparison: {outcome.page}")
    for name, message in outcome.failed.items():
        print(f"failed: {name}: {message}", file=sys.stderr)
    return EXIT_USER if outcome.failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
