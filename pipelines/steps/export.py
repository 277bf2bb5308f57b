"""`step: export`: write the model in deployable formats, and prove that each loads with the same codes and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_peft.errors import Problem
from compress_peft.export import EXPORTERS, Exporter, verify_reloaded
from compress_peft.loading import load
from compress_peft.weights.affine import affine_spec
from compress_peft.weights.compressed import dtype_from_name
from compress_peft.weights.storage import Spec
from eval.memory import estimate_export
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.validation import nest


@STEPS.register
class Export(Step):
    """Write the model in one format that others load, or in several."""

    step: Literal["export"] = "export"
    exporter: EXPORTERS.union()  # type: ignore[valid-type]
    """The format and its settings, written beside `step`."""
    also: tuple[EXPORTERS.union(), ...] = ()  # type: ignore[valid-type]
    """Further formats: names, or blocks of `format` and its settings. Each gets a folder of its own."""

    forbids: ClassVar[dict[str, str]] = {
        "adapted": "its adapter is not merged yet -> put a merge step (e.g. policy: bundle) before it",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"exported"})
    nested: ClassVar[str | None] = "exporter"

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "exporter" in values:
            return values
        also = {"also": values["also"]} if "also" in values else {}
        return nest({key: value for key, value in values.items() if key != "also"}, "exporter") | also

    @property
    def exporters(self) -> tuple[Exporter, ...]:
        return (self.exporter, *self.also)

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        states = frozenset[str]().union(*(step.states_added() for step in earlier))
        problems = []
        if "bundled" in states:
            for exporter in self.exporters:
                if not exporter.holds_adapters:
                    what = f'format "{exporter.format}" holds no adapter, and a bundle keeps it apart'
                    fix = "merge with policy static or dense, or use format: folder"
                    problems.append(Problem(f"{where}.format", what, fix))
        formats = [exporter.format for exporter in self.exporters]
        twice = sorted({name for name in formats if formats.count(name) > 1})
        if twice:
            what = f"{', '.join(twice)} stands there twice"
            problems.append(Problem(f"{where}.also", what, "name each format once; use another export step for more"))
        return problems

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        specs = planned_specs(shape)
        return [
            Problem(f"{where}.format", f'"{exporter.format}" cannot hold {problem.where}: {problem.what}', problem.fix)
            for exporter in self.exporters
            for problem in exporter.refusals(specs)
        ]

    def decoder_only(self) -> str:
        names = [exporter.format for exporter in self.exporters if not exporter.encoder_decoder]
        if not names:
            return ""
        able = ", ".join(name for name in EXPORTERS if EXPORTERS[name].encoder_decoder)
        return f"what loads the format {' and '.join(names)} runs decoder-only models -> use one of: {able}"

    def label(self) -> str:
        how = "reloaded" if self.exporter.loadable else "measured before"
        return f"exported ({self.exporter.format}), {how}"

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        target = folder / "model"
        facts = self._write(self.exporter, model, tokenizer, target, state)
        for exporter in self.also:
            name = exporter.format
            facts[f"also_{name}"] = self._write(exporter, model, tokenizer, folder / name, state)
        state.forget_model()  # what is measured from here on is what stands on disk
        return StepResult(backbone=state.relative(target) if self.exporter.loadable else None, facts=facts)

    @staticmethod
    def _write(
        exporter: Exporter, model: nn.Module, tokenizer: PreTrainedTokenizerBase, target: Path, state: RunState
    ) -> dict[str, Any]:
        facts = exporter.export(model, tokenizer, target)
        if exporter.loadable:
            reloaded, _ = load(target, state.device, state.dtype)
            facts |= verify_reloaded(model, reloaded, exporter.tolerance, str(target))
        return facts | {"folder": state.relative(target)}

    def estimate(self, shape: ModelShape) -> StepEstimate:
        size = shape.weight_bytes() + 4 * shape.adapter_parameters
        rest = shape.weight_bytes() - shape.compressed_bytes()
        half = shape.compressed_bytes() + rest * 2 / shape.bytes_each  # what is not compressed, in half precision
        peaks = [
            estimate_export(
                shape.model,
                size,
                written=size if exporter.loadable else half,
                dense=0 if exporter.loadable else 4 * shape.parameters,
            )
            for exporter in self.exporters
        ]
        return StepEstimate(memory=max(peaks), disk=size * len(self.exporters))


def planned_specs(shape: ModelShape) -> dict[str, Spec]:
    """By layer, what the quantizer before this step will make of it; empty where that is not known."""
    quantizer = shape.quantizer
    if quantizer is None:
        return {}
    specs = {}
    by_columns: dict[int, Spec] = {}
    for name, (rows, columns) in shape.selected(quantizer).items():
        if columns not in by_columns:
            if quantizer.needs:  # calibrated methods round to integer zeros
                grid = quantizer.model_dump()
                if not {"bits", "group_size", "symmetric"} <= grid.keys():
                    return {}
                zero = None if grid["symmetric"] else torch.uint8
                scale = dtype_from_name(grid.get("scale_dtype", "float16"))
                by_columns[columns] = affine_spec((1, columns), grid["bits"], grid["group_size"], zero, scale)
            else:
                by_columns[columns] = quantizer.quantize(torch.linspace(-1, 1, columns)[None]).spec()
        specs[name] = {**by_columns[columns], "shape": [rows, columns]}
    return specs
