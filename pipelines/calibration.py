"""Calibration text for the steps that look at activations: where it comes from, and what it takes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_peft.data.blocks import CalibrationSettings, calibration_blocks, shared_passages
from compress_peft.errors import ConfigError, DataError, Problem
from pipelines.plan import ModelShape
from pipelines.state import RunState


def calibration_text(state: RunState, settings: CalibrationSettings) -> tuple[Tensor, dict[str, Any]]:
    """Token ids (samples, length) and what identifies them.

    Only documents of the training split, or the given file, are read: nothing of validation or test.

    Raises:
        ConfigError: it is the text that perplexity is measured on.
        DataError: the file cannot be read, or there is too little text.
    """
    if settings.text is None:
        documents, source = list(dict.fromkeys(item.text for item in state.data().train)), "training split"
    else:
        path = Path(settings.text).expanduser()
        evaluated = state.recipe.evaluate.perplexity
        if evaluated is not None and Path(evaluated.text).expanduser().resolve() == path.resolve():
            what = f"{path} is also the text that perplexity is measured on"
            raise ConfigError(Problem("calibration.text", what, "calibrate on another text"))
        try:
            documents, source = [path.read_text(encoding="utf-8")], str(path)
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path} cannot be read: {error}"
            raise DataError(Problem("calibration.text", what, "give a text file in UTF-8")) from error
    blocks = calibration_blocks(state.tokenizer(), documents, settings)
    return blocks, {
        "source": source,
        "documents": len(documents),
        "samples": blocks.shape[0],
        "length": blocks.shape[1],
        "tokens": blocks.numel(),
        "sha256": hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
    }


def overlap_notes(state: RunState, blocks: Tensor) -> list[tuple[str, str]]:
    """A note for every text of the evaluation that has passages of the calibration (samples, length) in it."""
    settings = state.recipe.evaluate.perplexity
    texts: dict[str, list[str]] = {}
    if settings is not None and settings.text != "test":
        path = Path(settings.text).expanduser()
        texts[str(path)] = [path.read_text(encoding="utf-8")]
    if state.recipe.data is not None:
        texts["the test split"] = [example.text for example in state.data().test]
    further = [task for task in state.tasks() if task.data is not state.recipe.data]
    texts |= {f"the task {task.name}": [example.text for example in task.test] for task in further}
    notes = []
    for name, documents in texts.items():
        if shared := shared_passages(state.tokenizer(), blocks, documents):
            what = f"{len(shared)} passages are shared by the calibration text and {name}, which makes the evaluation"
            notes.append(("calibration", f'{what} too favourable: "{shared[0][:80]}"'))
    return notes


def check_calibration(settings: CalibrationSettings, shape: ModelShape, where: str) -> list[Problem]:
    """What is wrong with the settings for a model of this shape."""
    problems = []
    if settings.text is not None and not Path(settings.text).expanduser().is_file():
        what = f'the file "{settings.text}" does not exist'
        problems.append(Problem(f"{where}.calibration.text", what, "give a text file, or leave it out"))
    limit = getattr(shape.model.config, "max_position_embeddings", None)
    if limit is not None and settings.length > limit:
        what = f"{settings.length} tokens exceed the model's {limit} positions"
        problems.append(Problem(f"{where}.calibration.length", what, f"use at most {limit}"))
    return problems
