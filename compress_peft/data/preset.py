"""Task presets: what a known task needs, as YAML files beside this module, under the user's own keys."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt

from compress_peft.data.datasets import is_one_pool, split_files
from compress_peft.errors import did_you_mean

SPLITS = ("train", "validation", "test")


class Preset(BaseModel):
    """One file under presets/; every section lies beneath the recipe's section of the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    """Name of the task in the report."""
    version: PositiveInt
    """Raised by every change that changes scores."""
    paper: str
    """Where the data come from, and whose splits, prompt and hyper-parameters these are."""
    data: dict[str, Any]
    """Source on the hub, fields, prompt, response, choices, splits, length."""
    evaluate: dict[str, Any] = {}
    """Metrics and how answers are generated."""
    training: dict[str, Any] = {}
    """Hyper-parameters of the paper, for `finetune` steps."""


def preset_names() -> list[str]:
    """The presets there are, in alphabetical order."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


@functools.cache
def load_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    if name not in preset_names():
        raise ValueError(f'there is no preset "{name}": {did_you_mean(name, preset_names())}')
    return Preset.model_validate(yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8")))


def merged(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key and section by section; where both have a value, the one above counts."""
    both = {**beneath, **above}
    for key in beneath.keys() & above.keys():
        if isinstance(beneath[key], dict) and isinstance(above[key], dict):
            both[key] = merged(beneath[key], above[key])
    return both


def completed(given: dict[str, Any]) -> dict[str, Any]:
    """A data section with everything that its preset, or its folder of splits, says and it does not say itself.

    Raises:
        ValueError: unknown preset, or a preset's splits of a file that has none.
    """
    given = dict(given)
    if isinstance(given.get("source"), dict) and isinstance(given["source"].get("path"), str):
        given["source"] = _as_path(given["source"]["path"])
    beneath = dict(load_preset(given["preset"]).data) if given.get("preset") is not None else {}
    own = given.get("splits") or {}
    source = given.get("source", beneath.get("source"))
    if not isinstance(own, dict) or not isinstance(source, str):
        return merged(beneath, given)
    named = beneath.pop("splits", {})
    if is_one_pool(source) and any(isinstance(part, dict) for part in named.values()):
        if not own:
            sizes = "splits: {train: 1000, validation: 100, test: 200}"
            raise ValueError(
                f'"{source}" has no splits of its own: give their sizes, e.g. {sizes}, or a folder with '
                "train.jsonl, validation.jsonl and test.jsonl"
            )
        named = {}
    elif (found := split_files(source)) is not None and (not named or found >= set(SPLITS)):
        named = {name: {"from": name} for name in SPLITS}
    splits = {name: _part(named.get(name), own.get(name)) for name in SPLITS if name in named or name in own}
    return {**merged(beneath, given), **({"splits": {**own, **splits}} if splits else {})}


def _part(named: dict[str, Any] | int | None, own: Any) -> Any:
    """One split: a number asks for so many examples of the split that the source has under this name."""
    if own is None or not isinstance(named, dict):
        return named if own is None else own
    if isinstance(own, int):
        return {**named, "count": own}
    if not isinstance(own, dict):
        return own
    return merged(named, {"from" if key == "source" else key: value for key, value in own.items()})


def _as_path(path: str) -> str:
    return path if path.startswith((".", "/", "~")) else f"./{path}"


def _folder() -> Any:
    return files("compress_peft.data") / "presets"
