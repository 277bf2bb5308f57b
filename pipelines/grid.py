"""The grid of a sweep: a base recipe, axes of options, and every combination as a typed recipe.

base: smollm2_135m_nf4_para.yaml        # a recipe, by path (from this file) or in place
grid:
  quantizer:                            # an axis: options, each with the keys it sets
    nf4: {steps.0: {step: quantize, method: nf4}}
    int4: {steps.0: {step: quantize, method: gptq, bits: 4}}
  seed: [0, 1, 2]                       # or a key with its values
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress_peft.errors import ConfigError, Problem, UserError
from pipelines.plan import make_plan
from pipelines.recipe import apply_overrides, parse_recipe, read_yaml, set_key
from pipelines.runner import resolved

Axes = dict[str, dict[str, dict[str, Any]]]
"""Axis -> option -> the keys that it sets."""


@dataclass(frozen=True)
class Variant:
    """One combination."""

    name: str
    recipe: Any
    folder: Path


def read_sweep(path: Path, grid: Sequence[str]) -> tuple[dict[str, Any], Axes, str]:
    """The base recipe, the axes (name -> option -> keys it sets) and the sweep's name.

    Raises:
        ConfigError: the file or --grid is not of the form that this module's head shows.
    """

    raw = read_yaml(path)
    problems = []
    axes: Axes = {}
    base, name = raw, path.stem
    if "grid" in raw or "base" in raw:
        name = raw.get("name", path.stem)
        base = raw.get("base")
        if isinstance(base, str):
            base = read_yaml(path.parent / base)
        if not isinstance(base, dict):
            problems.append(
                Problem("base", "must be the path of a recipe, or the recipe itself", "add base: FILE.yaml")
            )
        problems += [
            Problem(key, "unknown key of a sweep", "a sweep has name, base and grid")
            for key in raw
            if key not in ("name", "base", "grid")
        ]
        given = raw.get("grid")
        if isinstance(given, dict):
            for axis, options in given.items():
                problems += _read_axis(axes, str(axis), options)
        elif given is not None:
            problems.append(Problem("grid", "must map axes to their options", "e.g. grid: {seed: [0, 1]}"))
    for text in grid:
        key, equals, values = text.partition("=")
        options = yaml.safe_load(f"[{values}]") if equals else None
        problems += _read_axis(axes, key, options)
    if not axes and not problems:
        problems.append(Problem("grid", "there is nothing to vary", "add grid: to the file, or --grid seed=0,1"))
    if problems:
        raise ConfigError(problems)
    return base, axes, name


def _read_axis(axes: Axes, axis: str, options: Any) -> list[Problem]:
    where = f"grid.{axis}"
    if isinstance(options, list) and options:
        short = axis.rpartition(".")[2]
        axes[axis] = {f"{short}_{value}": {axis: value} for value in options}
    elif isinstance(options, dict) and options and all(isinstance(keys, dict) for keys in options.values()):
        axes[axis] = {str(option): keys for option, keys in options.items()}
    else:
        what = "must be a list of values, or map option names to the keys they set"
        return [Problem(where, what, "e.g. seed: [0, 1] or quantizer: {nf4: {steps.0.method: nf4}}")]
    if isinstance(options, list) and len(axes[axis]) < len(options):
        return [Problem(where, "gives a value twice", "give each value once")]
    return []


def expand(base: dict[str, Any], axes: Axes, overrides: Sequence[str], folder: Path) -> list[Variant]:
    """All combinations, the first axis varying slowest.

    Raises:
        ConfigError: with the problems of all combinations, each told once.
    """

    variants: list[Variant] = []
    problems: dict[tuple[str, str], Problem] = {}
    for combination in itertools.product(*(options.items() for options in axes.values())):
        name = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in option) for option, _ in combination)
        raw = apply_overrides(base, list(overrides))
        try:
            for _, keys in combination:
                for key, value in keys.items():
                    set_key(raw, key, value)
            raw["name"] = name
            variants.append(Variant(name, parse_recipe(raw), folder / name))
        except UserError as error:
            for problem in error.problems:
                where = f"{name}: {problem.where}"
                problems.setdefault((problem.where, problem.what), Problem(where, problem.what, problem.fix))
    if problems:
        raise ConfigError(list(problems.values()))
    return variants


def shared_steps(first: Any, other: Any) -> int:
    """How many leading steps two recipes have in common; -1 where not even the original model's measurement is."""
    one, two = resolved(first), resolved(other)
    head = ("model", "data", "seed", "device", "evaluate")
    if any(one[key] != two[key] for key in head):
        return -1
    pairs = zip(one["steps"], two["steps"], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def check(variants: Sequence[Variant]) -> list[Problem]:
    """What is missing for a real run.

    Raises:
        ConfigError: a recipe does not fit its model; the problems of all variants, each told once.
    """

    problems: dict[tuple[str, str], Problem] = {}
    missing: dict[tuple[str, str], Problem] = {}
    for variant in variants:
        plan = make_plan(variant.recipe, variant.folder)
        for found, told in ((plan.problems, problems), (plan.missing, missing)):
            for problem in found:
                where = f"{variant.name}: {problem.where}"
                told.setdefault((problem.where, problem.what), Problem(where, problem.what, problem.fix))
    if problems:
        raise ConfigError(list(problems.values()) + list(missing.values()))
    return list(missing.values())


def listing(variants: Sequence[Variant]) -> list[str]:

    lines = [f"{len(variants)} runs"]
    for index, variant in enumerate(variants):
        count = max((shared_steps(variant.recipe, other.recipe) for other in variants[:index]), default=-1)
        labels = [step.label() for step in variant.recipe.steps]
        marked = [f"({label})" if place < count else label for place, label in enumerate(labels)]
        lines.append(f"  {variant.name}: {' -> '.join(marked)}")
    return [*lines, "steps in brackets are taken from an earlier run"]
