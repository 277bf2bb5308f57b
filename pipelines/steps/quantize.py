"""`step: quantize`: replace the weights of linear layers by compressed ones."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from compress_peft.data.blocks import CalibrationSettings, calibration_blocks
from compress_peft.errors import ConfigError, DataError, ModelError, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.models.save import save_model
from compress_peft.models.walk import CHUNK_TOKENS
from compress_peft.quantization import QUANTIZERS, quantize_model
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.validation import nest


@STEPS.register
class Quantize(Step):
    """Quantize the weights of the linear layers in the decoder blocks."""

    step: Literal["quantize"] = "quantize"
    quantizer: QUANTIZERS.union()  # type: ignore[valid-type]
    """The method and its settings, written beside `step`."""

    forbids: ClassVar[dict[str, str]] = {
        "quantized": "the model is quantized already -> keep one quantize step",
        "adapted": "its adapter is not merged yet -> put a merge step before it, or quantize before finetune",
        "bundled": "a bundle keeps its adapter apart -> quantize before finetune",
        "exported": "the model is exported already -> put export last",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"quantized"})
    nested: ClassVar[str | None] = "quantizer"

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        return nest(values, "quantizer")

    def label(self) -> str:
        return f"quantized ({self.quantizer.method})"

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        blocks, calibration = self._calibration(state)
        summary = quantize_model(model, self.quantizer, blocks)
        save_model(model, folder / "model", tokenizer)
        totals = {"bits_per_weight": summary.bits_per_weight, "relative_error": summary.relative_error}
        return StepResult(
            backbone=state.relative(folder / "model"), facts={**asdict(summary), **totals, "calibration": calibration}
        )

    def _calibration(self, state: RunState) -> tuple[Tensor | None, dict[str, Any] | None]:
        """Token ids (samples, length) and what identifies them; None if the method needs no data.

        Only documents of the training split, or the given file, are read: nothing of validation or test.
        """
        if not self.quantizer.needs:
            return None, None
        settings: CalibrationSettings = self.quantizer.calibration
        if settings.text is None:
            documents, source = [example.text for example in state.data().train], "training split"
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

    def requires_data(self) -> str | None:
        if not self.quantizer.needs or self.quantizer.calibration.text is not None:
            return None
        return f'"{self.quantizer.method}" calibrates on the training split (or on calibration: {{text: FILE}})'

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        return [*self._check_calibration(shape, where), *self._check_layers(shape, where)]

    def _check_calibration(self, shape: ModelShape, where: str) -> list[Problem]:
        if not self.quantizer.needs:
            return []
        settings: CalibrationSettings = self.quantizer.calibration
        problems = []
        if settings.text is not None and not Path(settings.text).expanduser().is_file():
            what = f'the file "{settings.text}" does not exist'
            problems.append(Problem(f"{where}.calibration.text", what, "give a text file, or leave it out"))
        limit = getattr(shape.model.config, "max_position_embeddings", None)
        if limit is not None and settings.length > limit:
            what = f"{settings.length} tokens exceed the model's {limit} positions"
            problems.append(Problem(f"{where}.calibration.length", what, f"use at most {limit}"))
        return problems

    def _check_layers(self, shape: ModelShape, where: str) -> list[Problem]:
        try:
            selected = shape.selected(self.quantizer)
        except ModelError as error:
            return [Problem(f"{where}.{problem.where}", problem.what, problem.fix) for problem in error.problems]
        reasons = {name: self.quantizer.check(size) for name, size in selected.items()}
        return [
            Problem(f"{where} ({name})", reason, "change the setting, or add the layer to skip")
            for name, reason in reasons.items()
            if reason is not None
        ]

    def estimate(self, shape: ModelShape) -> StepEstimate:
        before = shape.weight_bytes()
        walk = self._walk_bytes(shape) if self.quantizer.needs else 0.0
        shape.quantize(self.quantizer)
        after = shape.weight_bytes()
        note = f"{before / after:.1f}x smaller"
        if walk:
            settings: CalibrationSettings = self.quantizer.calibration
            note += f"; calibration on {settings.samples} x {settings.length} tokens takes up to {walk / 2**20:.0f} MiB"
        return StepEstimate(memory=before + shape.largest_layer_bytes() + walk, disk=after, note=note)

    def _walk_bytes(self, shape: ModelShape) -> float:
        """At most: hidden states of all calibration tokens, one block's Hessians (as if no two layers shared one), the
        activations of one pass through a block, and three more matrices like the largest Hessian for its factor."""
        settings: CalibrationSettings = self.quantizer.calibration
        config = shape.model.config.get_text_config()
        blocks: dict[str, list[int]] = {}
        for name, (_, columns) in shape.selected(self.quantizer).items():
            block = next(root for root, _ in decoder_layers(shape.model) if name.startswith(f"{root}."))
            blocks.setdefault(block, []).append(columns)
        hessians = 4.0 * max(sum(size**2 for size in sizes) for sizes in blocks.values())
        factor = 4.0 * 3 * max(max(sizes) for sizes in blocks.values()) ** 2
        states = settings.samples * settings.length * config.hidden_size * shape.bytes_each
        chunk = max(CHUNK_TOKENS, settings.length)
        passing = shape.activation_bytes(chunk, checkpointing=False) / config.num_hidden_layers
        return states + hessians + factor + passing
