"""The state of a run: where the current model stands on disk, and the model itself when somebody needs it."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_peft.data.build import DataSettings, TaskData, build_data
from compress_peft.data.examples import Example
from compress_peft.loading import choose_device, choose_dtype, load
from compress_peft.models.layers import is_encoder_decoder
from compress_peft.models.sources import ResolvedModel
from compress_peft.training.batches import Batch, TokenPair, batches, encode_all
from pipelines.tasks import ScoredTask, scored_tasks

if TYPE_CHECKING:
    from pipelines.steps.base import StepResult


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a killed run leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    Path(scratch).chmod(0o644)
    os.replace(scratch, path)


class RunState:
    """What the steps of one run share. The model in memory is always the one that stands on disk."""

    def __init__(self, recipe: Any, folder: Path, source: ResolvedModel):
        self.recipe = recipe
        self.folder = folder
        self.source = source
        self.device = choose_device(recipe.device)
        self.dtype = choose_dtype(recipe.model.dtype, self.device)
        self.backbone = source.folder
        self.adapter: Path | None = None
        self._model: tuple[nn.Module, PreTrainedTokenizerBase] | None = None
        self._data: TaskData | None = None
        self._tasks: list[ScoredTask] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def model(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The current model in evaluation mode and its tokenizer, loaded if need be."""
        if self._model is None:
            self._model = load(
                self.backbone,
                self.device,
                self.dtype,
                adapter=self.adapter,
                trust_remote_code=self.recipe.model.trust_remote_code,
            )
        return self._model

    def replace_model(self, model: nn.Module) -> None:
        """Say that a step changed the model and what is on disk together."""
        self._model = (model, self.model()[1])

    def forget_model(self) -> None:
        """Free the model; the next use loads it from disk."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def apply(self, result: StepResult) -> None:
        """Move on to what a finished step left on disk."""
        if result.backbone is not None:
            self.backbone = self.folder / result.backbone
        if result.adapter is not None:
            self.adapter = self.folder / result.adapter if result.adapter else None

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone; does not load the model."""
        if self._model is not None:
            return self._model[1]
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                self.source.folder, trust_remote_code=self.recipe.model.trust_remote_code
            )
        return self._tokenizer

    def data_settings(self) -> DataSettings:
        assert self.recipe.data is not None, "check_order refuses steps that need data without a data section"
        return self.recipe.data

    def data(self) -> TaskData:
        """The task's splits, built at first use."""
        if self._data is None:
            self._data = build_data(self.data_settings(), self.tokenizer())
        return self._data

    def tasks(self) -> list[ScoredTask]:
        """What every stage is scored on, built at first use."""
        if self._tasks is None:
            own = self.data() if self.recipe.data is not None else None
            self._tasks = scored_tasks(self.recipe, own, self.tokenizer())
        return self._tasks

    def share_data(self, other: RunState) -> None:
        """Use the splits that another state has built already."""
        self._data, self._tasks, self._tokenizer = other._data, other._tasks, other._tokenizer

    def calibration_batches(self, prompts: int, batch_size: int = 8) -> Iterator[Batch]:
        """The first prompts of the training split, without responses; nothing of validation or test is seen."""
        tokenizer = self.tokenizer()
        pairs = self._encoded(self.data().train[:prompts])
        for batch in batches([(prompt, []) for prompt, _ in pairs], tokenizer, batch_size):
            yield batch.to(self.device)

    def held_out_batches(self, texts: int, batch_size: int = 8) -> Iterator[Batch]:
        """The first examples of the validation split with their responses (compared with, never trained on)."""
        tokenizer = self.tokenizer()
        pairs = self._encoded(self.data().validation[:texts])
        for batch in batches(pairs, tokenizer, batch_size):
            yield batch.to(self.device)

    def _encoded(self, examples: Sequence[Example]) -> list[TokenPair]:
        length, apart = self.data_settings().max_length, is_encoder_decoder(self.model()[0])
        return encode_all(self.tokenizer(), examples, length, eos=False, apart=apart)
