"""`python -m pipelines.run CONFIG.yaml`: run a recipe, or show what it would do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXIT_DONE, EXIT_BUG, EXIT_USER = 0, 1, 2

DESCRIPTION = """\
Run the recipe in CONFIG: load the model, do the steps in order, measure after each, and write a report.

exit codes: 0 done; 2 the configuration or this machine does not allow it (see the message); 1 a bug"""

EXAMPLES = """\
examples:
  python -m pipelines.run configs/smollm2_135m_nf4_para.yaml
  python -m pipelines.run configs/llama2_7b_nf4_para.yaml --dry-run
  python -m pipelines.run configs/smollm2_135m_nf4_para.yaml --set seed=1 --set steps.0.double_quant=false
  python -m pipelines.run configs/smollm2_135m_nf4_para.yaml --resume
  torchrun --nproc-per-node 4 -m pipelines.run CONFIG   (a process a GPU: calibration is divided among them)
  python -m pipelines.methods --presets   (the known tasks, for data: {preset: ...})"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments, shared with `compress-peft run`."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the recipe, a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved plan, the memory and disk each step will need, and what is missing; load nothing",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe (repeatable): seed=1, model.source=/path, steps.0.method=nf4",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on where the run in this folder stopped")
    existing.add_argument("--overwrite", action="store_true", help="delete the earlier run in this folder first")


def execute(arguments: argparse.Namespace) -> int:
    """Run with parsed arguments; user errors become a message and exit code 2."""
    from compress_peft.errors import UserError  # imports torch: after the arguments are known to be right

    try:
        return _execute(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
        return EXIT_USER


def _execute(arguments: argparse.Namespace) -> int:
    from compress_peft.models import processes
    from pipelines.recipe import apply_overrides, parse_recipe, read_yaml

    raw = apply_overrides(read_yaml(arguments.config), arguments.overrides)
    recipe = parse_recipe(raw, default_name=arguments.config.stem)
    folder = arguments.output or Path(recipe.output) / recipe.name
    together = processes.join()
    if together.leads:
        _lead(arguments, recipe, folder)
        together.from_first(None)  # no step follows
    else:
        from pipelines.runner import follow_recipe

        follow_recipe(recipe, folder)
    processes.leave()
    return EXIT_DONE


def _lead(arguments: argparse.Namespace, recipe: Any, folder: Path) -> None:
    """In the only process, or the first of several."""
    from compress_peft.errors import ConfigError, MissingRequirement
    from pipelines.plan import make_plan
    from pipelines.runner import run_recipe

    plan = make_plan(recipe, folder)
    if plan.problems:
        raise ConfigError(plan.problems + plan.missing)
    print("\n".join(plan.lines), flush=True)
    if arguments.dry_run:
        for problem in plan.missing:
            print(f"missing      {problem}")
        print("ready to run" if not plan.missing else "not ready: a real run would stop at what is missing")
        return
    if plan.missing:
        raise MissingRequirement(plan.missing)
    report = run_recipe(recipe, folder, resume=arguments.resume, overwrite=arguments.overwrite, command=sys.argv)
    print(f"report: {report}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.run",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return execute(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
