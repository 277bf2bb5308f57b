"""Errors that users read: what was given, what was expected, where, and what to do next.

Every error that a user can cause is a `UserError` (a `ValueError`) and carries a list of `Problem`s,
so that all offenders are reported at once. The command line prints them without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    where: the YAML key, file or layer, e.g. "steps[1].adapter.rank" or "model.layers.0.mlp.up_proj".
    what: what was given and what was expected.
    fix: the next action, an imperative sentence.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    -> {self.fix}" if self.fix else head


class UserError(ValueError):
    """A mistake that the user can repair; `problems` lists all of them."""

    summary = "cannot continue"

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        return "\n".join([f"{self.summary} ({count} {noun})", *(f"  {p}" for p in self.problems)])


class ConfigError(UserError):
    """The recipe or the settings of a method are wrong."""

    summary = "the configuration is not valid"


class ModelError(UserError):
    """A model cannot be loaded, or its layers do not fit a method."""

    summary = "the model does not fit"


class DataError(UserError):
    """Data are missing, empty, malformed, or shared between training and test."""

    summary = "the data cannot be used"


class MissingRequirement(UserError):
    """Something outside the configuration is missing: weights, a hub, a GPU, memory, a package."""

    summary = "this machine lacks something that the run needs"


class CorruptFile(UserError):
    """A file that was written earlier is damaged or incomplete."""

    summary = "a file is damaged"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """An action that names the closest known spelling, or lists what exists."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"? known: {", ".join(names)}'
    return f"use one of: {', '.join(names)}"
