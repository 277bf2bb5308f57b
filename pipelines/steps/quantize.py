"""`step: quantize`: replace the weights of linear layers by compressed ones."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, model_validator
from torch import Tensor, nn

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.errors import ConfigError, ModelError, Problem
from compress_peft.loading import load
from compress_peft.models.empty import empty_model, match_folder
from compress_peft.models.layers import is_encoder_decoder, linear_layers
from compress_peft.models.needs import estimate_walk, prefers_out_of_core
from compress_peft.models.out_of_core import ACTIVATIONS_IN_MEMORY
from compress_peft.models.processes import current
from compress_peft.models.save import save_model
from compress_peft.models.walk import WHOLE
from compress_peft.quantization import QUANTIZERS, quantize_folder, quantize_model
from compress_peft.quantization.apply import list_names, select_layers
from compress_peft.quantization.base import affine_bits
from compress_peft.quantization.head import HeadBits, QuantizedHead, head_group, quantize_head
from compress_peft.quantization.mixed import Mixed
from compress_peft.quantization.quarot import rotate_model, rotation_problems
from compress_peft.quantization.smoothquant import Smoothing, with_smoothing
from compress_peft.registry import changed
from eval.memory import layer_bytes
from pipelines.calibration import calibration_text, check_calibration, overlap_notes
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.validation import nest

FROM_DISK = "calibration block by block from disk is for one stack of blocks -> leave out_of_core out"


@STEPS.register
class Quantize(Step):
    """Quantize the weights of the linear layers in the decoder blocks."""

    step: Literal["quantize"] = "quantize"
    quantizer: QUANTIZERS.union()  # type: ignore[valid-type]
    """The method and its settings, written beside `step`."""
    out_of_core: bool | Literal["auto"] = "auto"
    """true: load, quantize and write one block at a time, so that the model never has to fit into memory; a killed run
    goes on at the block where it stopped. The result is the same, bit for bit. auto: when the dense model would take
    more than half of the memory that is available. On CPUs only."""
    rotate: bool = False
    """true: rotate the model first (QuaRot), which spreads outliers over all channels; the model stays the same
    function. For models with blocks like Llama's, in memory. A head that is tied to the embedding becomes one of its
    own."""
    smooth: Annotated[
        Smoothing | None, BeforeValidator(Smoothing.read, json_schema_input_type=bool | float | Smoothing | None)
    ] = None
    """true, or a number from 0 to 1 (SmoothQuant's alpha; true is 0.5): move outliers of the activations behind norms
    into the weights first; the model stays the same function. For `llm_int8` above all, which rounds activations."""
    head_bits: HeadBits | None = None
    """4 or 8: round the output head to integers too, and with it the token embedding where both are one weight. In a
    small model the head is most of what is left, in bytes and in the time of a token. null: it stays as it is."""

    forbids: ClassVar[dict[str, str]] = {
        "quantized": "the model is quantized already -> keep one quantize step",
        "adapted": "its adapter is not merged yet -> put a merge step before it, or quantize before finetune",
        "bundled": "a bundle keeps its adapter apart -> quantize before finetune",
        "exported": "the model is exported already -> put export last",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"quantized"})

    @classmethod
    def added_by(cls, raw: dict[str, Any]) -> frozenset[str]:
        method = raw.get("method")
        fixed = method in QUANTIZERS and QUANTIZERS[str(method)].fixed_codes
        return cls.adds | ({"fixed codes"} if fixed else set())

    nested: ClassVar[str | None] = "quantizer"

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {key: value for key, value in values.items() if key in ("out_of_core", "rotate", "smooth", "head_bits")}
        rest = {key: value for key, value in values.items() if key not in own}
        if "method" in rest:  # also where the method has a setting of this name
            return {"step": rest.pop("step", None), "quantizer": rest} | own
        return nest(rest, "quantizer") | own

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rotate and self.out_of_core is True:
            raise ValueError("rotate needs the whole model in memory: leave out_of_core out, or rotate")
        if self.smooth is not None and self.quantizer.needs and "calibration" in self.smooth.model_fields_set:
            what = f"{self.quantizer.method} calibrates itself, on the text that smooth takes too"
            raise ValueError(f"{what}: give calibration beside method, not in smooth")
        if isinstance(self.quantizer, Mixed) and self.quantizer.in_bytes and self.head_bits is not None:
            raise ValueError("a budget in bytes counts the head as it is: with head_bits give the budget in bits")
        return self

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        if not any("pruned" in step.states_added() for step in earlier):
            return []
        if self.rotate:
            return [Problem(f"{where}.rotate", "would fill the zeros of the pruned model", "leave rotate out")]
        if self.quantizer.keeps_zeros:
            return []
        fix = f"use one of: {', '.join(name for name in QUANTIZERS if QUANTIZERS[name].keeps_zeros)}"
        what = f'"{self.quantizer.method}" would fill the zeros of the pruned model'
        return [Problem(f"{where}.method", what, fix)]

    def statistics(self) -> tuple[str, ...]:
        """Of NEEDS, what the walk over the blocks has to see."""
        return with_smoothing(self.quantizer.needs, self.smooth is not None)

    def calibration(self) -> CalibrationSettings | None:
        """None if nothing needs data."""
        if self.quantizer.needs:
            settings: CalibrationSettings = self.quantizer.calibration
            return settings
        return self.smooth.calibration if self.smooth is not None else None

    def shares_work(self) -> bool:
        return not WHOLE & set(self.statistics())

    def leaves_layers(self) -> bool:
        return bool(changed(self.quantizer, "targets", "skip"))

    def decoder_only(self) -> str:
        if self.rotate:
            return "rotate is for blocks like Llama's -> leave rotate out"
        return FROM_DISK if self.out_of_core is True and self.calibration() is not None else ""

    def label(self) -> str:
        return f"quantized ({self.quantizer.method})"

    def run(self, state: RunState, folder: Path) -> StepResult:
        blocks, calibration = self._calibration(state)
        notes = [] if blocks is None else self._overlap(state, blocks)
        work = folder / "checkpoints" / "walk"  # what stands under this name survives a kill
        setting = False if self.rotate else self.out_of_core
        out_of_core = goes_out_of_core(setting, state, work, notes, "quantized", blocks is not None)
        processes = current()
        for _, note in notes if processes.leads else ():
            print(f"warning: {note}", file=sys.stderr, flush=True)
        if out_of_core:
            state.forget_model()
            target = folder / ("model" if self.head_bits is None else "blocks")
            summary = quantize_folder(
                state.backbone,
                target,
                self.quantizer,
                blocks,
                dtype=state.dtype,
                tokenizer=state.tokenizer(),
                smooth=self.smooth and self.smooth.alpha,
                work=work,
                trust_remote_code=state.recipe.model.trust_remote_code,
            )
            head = None
            if processes.leads:
                work.parent.rmdir()
                head = self._head_of_folder(target, folder / "model", state)
        else:
            model, tokenizer = state.model()
            if self.rotate:
                notes += [("rotate", note) for note in rotate_model(model)]
            summary = quantize_model(model, self.quantizer, blocks, smooth=self.smooth and self.smooth.alpha)
            head = quantize_head(model, self.head_bits) if self.head_bits is not None else None
            if processes.leads:
                save_model(model, folder / "model", tokenizer)
        if summary.plan and processes.leads:
            counts = Counter(summary.plan.values())
            parts = ", ".join(f"{number} layers at {bits} bits" for bits, number in sorted(counts.items()))
            print(f"plan: {parts}; {summary.bits_per_weight:.3f} bits per weight with scales and zeros", flush=True)
        facts = asdict(summary) | {
            "bits_per_weight": summary.bits_per_weight,
            "relative_error": summary.relative_error,
            "calibration": calibration,
            "out_of_core": out_of_core,
            "processes": processes.count,
            "smooth": self.smooth and self.smooth.alpha,
            "head": asdict(head) if head is not None else None,
            "notes": [*summary.notes, *notes],
        }
        return StepResult(backbone=state.relative(folder / "model"), facts=facts)

    def _head_of_folder(self, source: Path, target: Path, state: RunState) -> QuantizedHead | None:
        """Quantize the head of a folder whose blocks are compressed already, which fits into memory by now."""
        if self.head_bits is None:
            return None
        model, tokenizer = load(
            source, state.device, state.dtype, trust_remote_code=state.recipe.model.trust_remote_code
        )
        head = quantize_head(model, self.head_bits)
        save_model(model, target, tokenizer)
        shutil.rmtree(source)
        return head

    def _overlap(self, state: RunState, blocks: Tensor) -> list[tuple[str, str]]:
        return overlap_notes(state, blocks)

    def _calibration(self, state: RunState) -> tuple[Tensor | None, dict[str, Any] | None]:
        """None if the method needs no data."""
        settings = self.calibration()
        return calibration_text(state, settings) if settings is not None else (None, None)

    def requires_data(self) -> str | None:
        settings = self.calibration()
        if settings is None or settings.text is not None:
            return None
        if not self.quantizer.needs:
            return "smooth calibrates on the training split (or on smooth: {calibration: {text: FILE}})"
        return f'"{self.quantizer.method}" calibrates on the training split (or on calibration: {{text: FILE}})'

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        settings = self.calibration()
        problems = check_calibration(settings, shape, where) if settings is not None else []
        if self.rotate:
            found = rotation_problems(shape.model)
            problems += [Problem(f"{where}.rotate ({item.where})", item.what, item.fix) for item in found]
        return [*problems, *self._check_layers(shape, where)]

    def _check_layers(self, shape: ModelShape, where: str) -> list[Problem]:
        try:
            selected = shape.selected(self.quantizer)
        except ModelError as error:
            return [Problem(f"{where}.{problem.where}", problem.what, problem.fix) for problem in error.problems]
        reasons: dict[str, list[str]] = {}
        for name, size in selected.items():
            if (reason := self.quantizer.check(size)) is not None:
                reasons.setdefault(reason, []).append(name)
        fix = "change the setting, or add the layers to skip"
        return [Problem(f"{where} ({list_names(names)})", reason, fix) for reason, names in reasons.items()]

    def estimate(self, shape: ModelShape) -> StepEstimate:
        before = shape.weight_bytes()
        if self.rotate:
            self._untie(shape)
        elif self.out_of_core is True or (
            self.out_of_core == "auto" and prefers_out_of_core(shape.model, shape.bytes_each)
        ):
            return self._estimate_blocks(shape, before)
        quantizer, calibration = self.quantizer, self.calibration()
        layers = dict(select_layers(shape.model, quantizer)[0])
        walk = shape.walking(
            layers, self.statistics(), calibration, quantizer.block_copies, quantizer.keeps_activations
        )
        self._shrink_head(shape)
        shape.quantize(quantizer)
        after = shape.weight_bytes()
        note = f"{before / after:.1f}x smaller"
        if calibration is not None:
            note += f"; calibration on {calibration.samples} x {calibration.length} tokens"
        rotated = before if self.rotate else 0.0
        made = (rotated + shape.compressed_bytes()) * shape.mapped
        return StepEstimate(memory=before + made + walk, disk=after, note=note)

    def _estimate_blocks(self, shape: ModelShape, before: float) -> StepEstimate:
        """Of the walk out of core."""
        settings = self.calibration()
        needed = estimate_walk(
            shape.model,
            dict(select_layers(shape.model, self.quantizer)[0]),
            self.quantizer.for_model(shape.model, shape.bytes_each).estimate_bits,
            shape.bytes_each,
            (settings.samples, settings.length) if settings else (0, 0),
            self.statistics(),
            ACTIVATIONS_IN_MEMORY,
            self.quantizer.block_copies,
            self.quantizer.keeps_activations,
        )
        shape.quantize(self.quantizer)
        whole = shape.weight_bytes()
        self._shrink_head(shape)
        memory = max(needed.memory, whole + layer_bytes(shape.model)) if self.head_bits is not None else needed.memory
        note = f"{before / shape.weight_bytes():.1f}x smaller; block by block, the whole model is never in memory"
        return StepEstimate(memory=memory, disk=needed.disk, note=note)

    def _untie(self, shape: ModelShape) -> None:
        """Count the head that a rotation makes out of a tied one."""
        head, embedding = shape.model.get_output_embeddings(), shape.model.get_input_embeddings()
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(torch.empty_like(head.weight))
            shape.parameters += head.weight.numel()

    def _shrink_head(self, shape: ModelShape) -> None:
        """Count the head's bytes as they will be."""
        head = shape.model.get_output_embeddings()
        if self.head_bits is None or not isinstance(head, nn.Linear):
            return
        size = (head.out_features, head.in_features)
        bits = affine_bits(size, self.head_bits, head_group(head.in_features), symmetric=False)
        name = next(name for name, layer in linear_layers(shape.model, inside_blocks=False) if layer is head)
        shape.compress({name: size[0] * size[1] * bits / 8})


def goes_out_of_core(
    setting: bool | Literal["auto"],
    state: RunState,
    work: Path,
    notes: list[tuple[str, str]],
    done: str,
    calibrated: bool,
) -> bool:
    """Whether a step that can work block by block does so. work: the folder of an unfinished walk. Processes that share
    the step do as the first one says, which sees the folder and the memory at one time.

    Adds to the notes where auto cannot do what it would; done: what the step does ("quantized"); calibrated: whether on
    calibration text, which out of core an encoder-decoder cannot have.

    Raises:
        ConfigError: it is asked for where it cannot work.
    """
    if setting is False:
        return False
    if state.device.type != "cpu":
        if setting == "auto":
            return False
        what = f"runs on the CPU, and the run's device is {state.device}"
        raise ConfigError(Problem("out_of_core", what, "set device: cpu, or leave out_of_core out"))
    processes = current()
    return processes.from_first(processes.leads and (setting is True or _prefers(state, work, notes, done, calibrated)))


def _prefers(state: RunState, work: Path, notes: list[tuple[str, str]], done: str, calibrated: bool) -> bool:
    """What auto stands for."""
    if work.exists():
        return True
    try:
        model = empty_model(state.backbone, state.dtype, state.recipe.model.trust_remote_code)
        if not prefers_out_of_core(model, state.dtype.itemsize * current().on_machine):
            return False
        if calibrated and is_encoder_decoder(model):
            return False
        match_folder(model, state.backbone)
    except ModelError as error:
        problem = error.problems[0]
        notes.append(("", f"{done} in memory, since block by block is not possible: {problem.where} {problem.what}"))
        return False
    return True
