"""`python -m pipelines.methods`: the methods there are, as the README's table, made from the registries alone."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import ConfigError, Problem, UserError
from compress_peft.merging import MERGERS
from compress_peft.registry import Method
from eval.reports import write_file

BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
STATES = (frozenset[str](), frozenset({"quantized"}))


def adapters_table() -> str:
    """Every PEFT method: what it does, its paper, and the merge policies that take it on a dense or 4-bit backbone."""
    lines = ["| `adapter.method` | what trains | merges by | paper |", "|---|---|---|---|"]
    for name in ADAPTERS:
        cls = ADAPTERS[name]
        paper = _cell(cls.paper)
        lines.append(f"| `{name}` | {_cell(summary(cls))} | {', '.join(merge_policies(name))} | {paper} |")
    return "\n".join(lines)


def summary(cls: type[Method]) -> str:
    """The first sentence of the class's documentation."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"\.(?=\s|$)", text)[0]


def merge_policies(name: str) -> list[str]:
    """The policies but bundle and auto, which take every adapter, that do not refuse this one out of hand."""
    adapter = ADAPTERS[name].model_construct()  # its defaults, also where a setting has none
    taken = []
    for policy in MERGERS:
        if policy in ("bundle", "auto"):
            continue
        if any(not MERGERS.create(policy).refusal(adapter, states) for states in STATES):
            taken.append(policy)
    return taken or ["bundle only"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def insert(text: str, table: str) -> str:
    """The document with the table between its markers.

    Raises:
        ConfigError: it has no markers.
    """
    if BEGIN not in text or END not in text:
        raise ConfigError(Problem("markers", f"the file has no {BEGIN} ... {END}", "add both lines where it belongs"))
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.methods", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END} of FILE")
    arguments = parser.parse_args(argv)
    if arguments.write is None:
        print(adapters_table())
        return 0
    try:
        text = arguments.write.read_text(encoding="utf-8")
        write_file(arguments.write, insert(text, adapters_table()))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
