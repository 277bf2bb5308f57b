"""What a run will do and need, told before anything is downloaded or loaded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from compress_peft.data.preset import SPLITS
from compress_peft.errors import MissingRequirement, ModelError, Problem, UserError
from compress_peft.loading import choose_device, choose_dtype
from compress_peft.models.encoder_decoder import auto_class
from compress_peft.models.gguf import gguf_config
from compress_peft.models.layers import is_encoder_decoder, linear_layers
from compress_peft.models.needs import walk_bytes
from compress_peft.models.random_model import config_from
from compress_peft.models.sources import file_in_package, missing_source
from compress_peft.quantization import Quantizer
from compress_peft.quantization.apply import select_layers
from eval.costs import MemoryEstimate
from eval.memory import estimate_inference, estimate_training, process_baseline
from pipelines.inputs import missing_inputs

SHORT_ANSWER = 8
"""Tokens of an answer that is one of a few choices."""


@dataclass(frozen=True)
class StepEstimate:
    """memory: bytes at the step's peak, without the process itself. disk: bytes that it leaves. at_most: what the
    memory depends on is not known yet, such as the lengths of texts, and the figure is an upper bound."""

    memory: float
    disk: float
    note: str = ""
    at_most: bool = False


class ModelShape:
    """The model without its weights (meta device), and what the planned steps have made of it so far."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, sequence_length: int, on_cpu: bool = True):
        self.model = model
        self.mapped = on_cpu and getattr(model.config, "dtype", None) in (None, dtype)
        """Weights that need no conversion stay in the file, mapped into memory: as long as one of them is left, all of
        it is counted."""
        self.sequence_length = sequence_length
        self.bytes_each = torch.empty((), dtype=dtype).element_size()
        self.adapter_parameters = 0
        self.recipe: Any = None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        self.quantizer: Quantizer | None = None
        self._compressed: dict[str, float] = {}

    def selected(self, quantizer: Quantizer) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the layers that the quantizer would compress.

        Raises:
            ModelError: a pattern matches no layer.
        """
        chosen, _ = select_layers(self.model, quantizer)
        return {name: (layer.out_features, layer.in_features) for name, layer in chosen}

    def quantize(self, quantizer: Quantizer) -> None:
        quantizer = quantizer.for_model(self.model, self.bytes_each)
        self.quantizer = quantizer
        for name, (rows, columns) in self.selected(quantizer).items():
            self._compressed[name] = rows * columns * quantizer.estimate_bits((rows, columns)) / 8

    def compress(self, layers: dict[str, float]) -> None:
        """layers: name -> bytes that it takes from now on."""
        self._compressed |= layers

    def weight_bytes(self) -> float:
        layers = dict(linear_layers(self.model, inside_blocks=False))
        compressed = sum(layers[name].weight.numel() for name in self._compressed)
        return (self.parameters - compressed) * self.bytes_each + sum(self._compressed.values())

    def compressed_bytes(self) -> float:
        """Of the compressed layers."""
        return sum(self._compressed.values())

    def decompressed_bytes(self) -> float:
        """What the compressed layers would take dense."""
        layers = dict(linear_layers(self.model, inside_blocks=False))
        return float(sum(layers[name].weight.numel() for name in self._compressed) * self.bytes_each)

    def walking(
        self,
        layers: dict[str, nn.Linear],
        needs: Sequence[str],
        calibration: Any,
        copies: float = 0,
        kept: bool = False,
    ) -> float:
        """Of a walk over the blocks of the model in memory, beyond its weights; see `walk_bytes`. calibration:
        CalibrationSettings, or None."""
        tokens = (calibration.samples, calibration.length) if calibration is not None else (0, 0)
        return walk_bytes(self.model, layers, self.bytes_each, tokens, needs, copies, kept)

    def response_length(self, length: int) -> int:
        """Tokens that are predicted, at most: answers of tasks with choices are short, others as long as the rows."""
        choices = self.recipe is not None and self.recipe.data is not None and self.recipe.data.choices
        return SHORT_ANSWER if choices else length

    def training(
        self,
        trainable: int,
        settings: Any,
        added: bool = True,
        length: int | None = None,
        response: int | None = None,
        **distilling: Any,
    ) -> MemoryEstimate:
        """Of the training loop without the process itself. settings: TrainingSettings. added: the parameters come on
        top of the model's weights. distilling: as `estimate_training` takes it."""
        length = length or self.sequence_length
        return estimate_training(
            self.model,
            self.weight_bytes(),
            trainable,
            batch=settings.batch_size,
            length=length,
            response=response or self.response_length(length),
            bytes_each=self.bytes_each,
            compressed=bool(self._compressed),
            checkpointing=settings.gradient_checkpointing,
            added=added,
            **distilling,
        )

    def running(self, profile: Any) -> MemoryEstimate:
        """Of the profile of what the steps have made so far, without the process itself."""
        return estimate_inference(
            self.model,
            self.weight_bytes() + 4 * self.adapter_parameters,
            batch=profile.batch_size,
            prompt=profile.prompt_tokens,
            new=profile.new_tokens,
            bytes_each=self.bytes_each,
            compressed=bool(self._compressed),
        )


@dataclass(frozen=True)
class Plan:
    """The result of planning: lines to print, and what is missing for a real run."""

    lines: tuple[str, ...]
    missing: tuple[Problem, ...]
    problems: tuple[Problem, ...]


def meta_model(recipe: Any) -> tuple[nn.Module | None, str]:
    """The model's structure without weights, and where its configuration came from.

    Raises:
        ModelError: the given or found configuration is not usable.
    """
    settings = recipe.model
    config, origin = None, ""
    if settings.source != "random" and missing_source(settings.source) is None:
        config, origin = _config_at_hand(settings)
    if config is None and settings.config is not None:
        config, origin = config_from(settings.config), "model.config of the recipe"
    if config is None:
        return None, "unknown until the model is there (give model.config to plan without it)"
    if getattr(config, "is_encoder_decoder", False) and origin.endswith(".gguf"):
        what = f"{config.model_type} is an encoder-decoder, and GGUF files are read for decoder-only models"
        raise ModelError(Problem("model.source", what, "give its folder or its hub id"))
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=settings.trust_remote_code), origin
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"transformers cannot build the model: {str(error).splitlines()[0][:300]}"
        raise ModelError(Problem("model.config", what, "correct the configuration")) from error


def _config_at_hand(settings: Any) -> tuple[Any, str]:
    from transformers import AutoConfig

    source = settings.source
    path = file_in_package(source) if source.startswith("package:") else Path(source).expanduser()
    if path.suffix == ".gguf":
        return gguf_config(path), str(path)
    repo, _, revision = source.partition("@")
    name = str(path) if path.exists() else repo
    kwargs = {"revision": revision} if revision else {}
    return AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **kwargs), source


def make_plan(recipe: Any, folder: Path) -> Plan:
    """Estimates for every step, and everything that a real run would miss here."""
    missing = missing_inputs(recipe.model, recipe.data, recipe.evaluate, recipe.device)
    problems: list[Problem] = []
    shape, origin, device, dtype = None, "", torch.device("cpu"), torch.float32
    try:
        device = choose_device(recipe.device)
    except MissingRequirement as error:
        missing += error.problems
        device = torch.device("cuda")
    dtype = torch.bfloat16 if device.type == "cuda" and recipe.model.dtype == "auto" else None
    dtype = dtype or choose_dtype(recipe.model.dtype, device)
    try:
        model, origin = meta_model(recipe)
    except UserError as error:
        model, problems = None, list(error.problems)
    lines = [f"run folder   {folder}", f"model        {recipe.model.source} (structure from: {origin})"]
    if model is not None:
        length = recipe.data.max_length if recipe.data is not None else 512
        shape = ModelShape(model, dtype, length, device.type == "cpu")
        shape.recipe = recipe
        hosts = f"{shape.parameters:,} parameters, {_size(shape.weight_bytes())} in {str(dtype).removeprefix('torch.')}"
        lines.append(f"             {type(model).__name__}, {hosts}, on {device}")
        problems += _decoder_only_problems(recipe, model)
    lines += _data_lines(recipe)
    if shape is not None and recipe.evaluate.profile is not None:
        lines.append(f"original     {_running(recipe, shape)}")
    step_lines, peak, disk = _step_lines(recipe, shape, problems)
    lines += step_lines
    if shape is not None:
        total = f"{_size(peak + process_baseline())} of memory ({_size(process_baseline())} the process itself)"
        lines.append(f"in all       about {total}, {_size(disk)} of disk")
        missing += _too_little(peak, disk, device, folder)
    return Plan(tuple(lines), tuple(missing), tuple(problems))


def _decoder_only_problems(recipe: Any, model: nn.Module) -> list[Problem]:
    """What the recipe asks for that an encoder-decoder cannot have."""
    if not is_encoder_decoder(model):
        return []
    problems = []
    evaluate = recipe.evaluate
    what = "it measures running text, which a decoder continues, and this model is an encoder-decoder"
    if evaluate.perplexity is not None and evaluate.perplexity.text != "test":
        fix = "leave text out: the loss of the test split's answers given their prompts stands for perplexity then"
        problems.append(Problem("evaluate.perplexity.text", what, fix))
    if evaluate.fidelity is not None:
        problems.append(Problem("evaluate.fidelity", what, "leave it out"))
    if evaluate.lm_eval is not None:
        what = "its tasks are scored as text that a decoder continues, and this model is an encoder-decoder"
        problems.append(Problem("evaluate.lm_eval", what, "leave it out; evaluate.task scores the test split"))
    for index, step in enumerate(recipe.steps):
        if reason := step.decoder_only():
            why, _, fix = reason.partition(" -> ")
            problems.append(Problem(f"steps[{index}]", f"{why}, and this model is an encoder-decoder", fix))
    return problems


def _data_lines(recipe: Any) -> list[str]:
    own = ["data         none"] if recipe.data is None else [f"data         {_data_line(recipe.data, SPLITS)}"]
    return own + [f"scored on    {_data_line(task.data, ('test',))}" for task in recipe.evaluate.tasks]


def _data_line(data: Any, names: Sequence[str]) -> str:
    sizes = ", ".join(f"{name} {_split_size(getattr(data.splits, name))}" for name in names)
    preset = f"preset {data.preset} on " if data.preset is not None else ""
    return f"{preset}{data.source or 'one source a split'}: {sizes}"


def _split_size(split: Any) -> str:
    return str(split) if isinstance(split, int) else f"{split.count or 'all'} from {split.source}"


def _step_lines(recipe: Any, shape: ModelShape | None, problems: list[Problem]) -> tuple[list[str], float, float]:
    lines, peak, disk = [], shape.weight_bytes() if shape else 0.0, 0.0
    for index, step in enumerate(recipe.steps):
        line = f"step {index + 1}       {step.step}: {step.label()}"
        if shape is not None:
            found = step.check(shape, f"steps[{index}]")
            problems += found
            if not found:
                try:
                    estimate = step.estimate(shape)
                except ModelError as error:
                    problems += [Problem(f"steps[{index}]", item.what, item.fix) for item in error.problems]
                    continue
                peak, disk = max(peak, estimate.memory), disk + estimate.disk
                note = f" ({estimate.note})" if estimate.note else ""
                bound = "at most " if estimate.at_most else ""
                line += f" - memory {bound}{_size(estimate.memory)}, disk {_size(estimate.disk)}{note}"
                if recipe.evaluate.profile is not None:
                    line += f"; afterwards {_running(recipe, shape)}"
        lines.append(line)
    return lines, peak, disk


def _running(recipe: Any, shape: ModelShape) -> str:
    needed = shape.running(recipe.evaluate.profile)
    cache = f"keys and values {_size(needed.kv_cache_bytes)}, passing {_size(needed.activation_bytes)}"
    return f"running {_size(needed.peak_bytes)}: weights {_size(needed.weights_bytes)}, {cache}"


def _too_little(peak: float, disk: float, device: torch.device, folder: Path) -> list[Problem]:
    missing = []
    if device.type == "cuda" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(device)[0]
        if peak > free:
            what = f"about {_size(peak)} of GPU memory are needed, {_size(free)} are free"
            missing.append(Problem("memory", what, "use a larger GPU, smaller batches or gradient_checkpointing"))
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
        if peak + process_baseline() > free:
            what = f"about {_size(peak + process_baseline())} of memory are needed, {_size(free)} are free"
            missing.append(Problem("memory", what, "use a smaller model, smaller batches or gradient_checkpointing"))
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if disk > free:
        what = f"about {_size(disk)} of disk are needed under {existing}, {_size(free)} are free"
        missing.append(Problem("disk", what, "free some, or choose another place with --output"))
    return missing


def _size(count: float) -> str:
    """Bytes for people."""
    if count <= 0:
        return "0 B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
