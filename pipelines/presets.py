"""Task presets in recipes: what they say of evaluation and training lies beneath the recipe's own keys."""

from __future__ import annotations

from typing import Any

from compress_peft.data.datasets import is_one_pool
from compress_peft.data.preset import Preset, load_preset, merged, preset_names

BATCH = {"batch_size", "gradient_accumulation"}


def under_recipe(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `evaluate` and the `training` of its `finetune` steps completed by its preset, if it has one.

    An unknown preset changes nothing here: the data section reports it.
    """
    data = raw.get("data")
    name = data.get("preset") if isinstance(data, dict) else None
    if name not in preset_names():
        return raw
    preset = load_preset(name)
    evaluate, steps = raw.get("evaluate", {}), raw.get("steps")
    completed = dict(raw)
    if isinstance(evaluate, dict):
        completed["evaluate"] = merged(preset.evaluate, evaluate)
    if isinstance(steps, list):
        completed["steps"] = [_trained(preset, step) for step in steps]
    return completed


def above_preset(task: dict[str, Any]) -> dict[str, Any]:
    """A further task completed by the preset of its data, and by empty splits where it names but a test split.

    An unknown preset changes nothing here: the data section reports it.
    """
    data = task.get("data")
    if not isinstance(data, dict):
        return task
    splits, source = data.get("splits"), data.get("source")
    if isinstance(splits, dict) and splits.keys() == {"test"} and isinstance(source, str) and is_one_pool(source):
        task = {**task, "data": {**data, "splits": {"train": 0, "validation": 0, **splits}}}
    name = data.get("preset")
    return merged(load_preset(name).evaluate.get("task", {}), task) if name in preset_names() else task


def _trained(preset: Preset, step: Any) -> Any:
    own = step.get("training", {}) if isinstance(step, dict) else None
    if not isinstance(own, dict) or step.get("step") != "finetune":
        return step
    taken = {key: value for key, value in preset.training.items() if key not in BATCH or not BATCH & own.keys()}
    return {**step, "training": merged(taken, own)} if taken else step


def presets_table() -> str:
    """Every preset, its version, where its data are and what it measures."""
    lines = ["| `data.preset` | version | task | source | scored by | from |", "|---|---|---|---|---|---|"]
    for name in preset_names():
        preset = load_preset(name)
        data, task = preset.data, preset.evaluate.get("task", {})
        source = " ".join(f"`{data[key]}`" for key in ("source", "subset") if key in data)
        scores = "judge" if "judge" in task else ", ".join(task.get("metrics", ["accuracy"]))
        lines.append(f"| `{name}` | {preset.version} | {preset.title} | {source} | {scores} | {preset.paper} |")
    return "\n".join(lines)
