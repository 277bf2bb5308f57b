"""The console script `compress-peft`."""

from __future__ import annotations

import argparse
import sys

from eval import compare
from pipelines import run, sweep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compress-peft", description="Compress, fine-tune, merge, measure and export language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runner = commands.add_parser(
        "run",
        help="run a recipe (the same as python -m pipelines.run)",
        description=run.DESCRIPTION,
        epilog=run.EXAMPLES.replace("python -m pipelines.run", "compress-peft run"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_arguments(runner)
    runner.set_defaults(execute=run.execute)
    commands.add_parser("schema", help="print the JSON schema of the YAML (the same as python -m pipelines.schema)")
    report = commands.add_parser("report", help="write the report of a finished run again (python -m pipelines.report)")
    report.add_argument("folder", help="the run folder")
    for name, module, text in (
        ("sweep", sweep, "run a grid of variants of a recipe (python -m pipelines.sweep)"),
        ("compare", compare, "compare finished runs (python -m eval.compare)"),
    ):
        command = commands.add_parser(
            name, help=text, description=module.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(execute=module.execute)
    arguments = parser.parse_args(argv)
    if arguments.command == "schema":
        from pipelines.schema import main as schema

        return schema()
    if arguments.command == "report":
        from pipelines.report.__main__ import main as rerender

        return rerender([arguments.folder])
    return int(arguments.execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
