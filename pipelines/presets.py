"""Task presets in recipes: what they say of evaluation and training lies beneath the recipe's own keys."""

from __future__ import annotations

from typing import Any

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
