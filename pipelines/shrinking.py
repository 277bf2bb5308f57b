"""The structured methods of `step: prune`: they leave a smaller model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from compress_peft.errors import ModelError, Problem
from compress_peft.models.save import save_model
from compress_peft.pruning.structured import Shrinker, block_parameters, shrink_model
from compress_peft.pruning.structured.plan import shrink
from pipelines.calibration import calibration_text, check_calibration, overlap_notes, walk_bytes
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import StepResult


def run_shrink(shrinker: Shrinker, state: RunState, folder: Path) -> StepResult:
    """Plan, cut and save; what went is in the facts."""
    blocks, calibration = calibration_text(state, shrinker.calibration)
    notes = overlap_notes(state, blocks)
    for _, note in notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    model, tokenizer = state.model()
    summary = shrink_model(model, shrinker, blocks)
    save_model(model, folder / "model", tokenizer)
    state.forget_model()  # the next use loads what is on disk
    facts = asdict(summary) | {"sparsity": summary.sparsity, "calibration": calibration, "notes": notes}
    return StepResult(backbone=state.relative(folder / "model"), facts=facts)


def check_shrink(shrinker: Shrinker, shape: ModelShape, where: str) -> list[Problem]:
    """What is wrong with the settings for a model of this shape."""
    problems = check_calibration(shrinker.calibration, shape, where)
    try:
        shrinker.widths(shape.model)
    except ModelError as error:
        problems += [Problem(f"{where}.{p.where}", p.what, p.fix) for p in error.problems]
    return problems


def estimate_shrink(shrinker: Shrinker, shape: ModelShape) -> StepEstimate:
    """Cuts the shape too, so that later steps are planned on what will be left.

    Raises:
        ModelError: it cannot be cut like this.
    """
    settings, size, before = shrinker.calibration, shape.weight_bytes(), block_parameters(shape.model)
    walk = walk_bytes(settings, shape, {}, hessians=False)
    if shrinker.gradients:
        walk += 4.0 * before + shape.activation_bytes(settings.length, checkpointing=False)
    shrink(shape.model, shrinker.widths(shape.model))
    shape.parameters = sum(parameter.numel() for parameter in shape.model.parameters())
    share = 1 - block_parameters(shape.model) / before
    note = f"{100 * share:.1f}% of the parameters in the decoder blocks go"
    return StepEstimate(memory=size + walk, disk=shape.weight_bytes(), note=note)
