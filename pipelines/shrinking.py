"""The structured methods of `step: prune`: they leave a smaller model."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path

from torch import nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import linear_layers
from compress_peft.models.save import save_model
from compress_peft.pruning.structured import Shrinker, block_parameters, shrink_model
from compress_peft.pruning.structured.plan import shrink
from compress_peft.training import TrainingSettings
from pipelines.calibration import calibration_text, check_calibration, overlap_notes
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
    settings, weights, before = shrinker.calibration, shape.weight_bytes(), block_parameters(shape.model)
    layers, sizes = dict(linear_layers(shape.model)), _sizes(shape.model)
    walk = shape.walking(layers, (), settings)
    if shrinker.gradients:  # of a sample, and their sums, and those of their squares
        trained = shape.training(0, TrainingSettings(batch_size=1), length=settings.length, response=settings.length)
        walk = 3 * 4.0 * before + trained.activation_bytes
    plan = shrinker.widths(shape.model)
    shrink(shape.model, plan)
    left = _sizes(shape.model)
    shape.parameters = sum(parameter.numel() for parameter in shape.model.parameters())
    cut = sum(math.prod(size) for name, size in left.items() if sizes.get(name) != size) * shape.bytes_each
    if plan.rotation is not None:
        cut = weights  # all of it is rotated before it is cut
    share = 1 - block_parameters(shape.model) / before
    note = f"{100 * share:.1f}% of the parameters in the decoder blocks go"
    memory = weights + max(walk, cut * shape.mapped)
    return StepEstimate(memory=memory, disk=shape.weight_bytes(), note=note, at_most=shrinker.gradients)


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
