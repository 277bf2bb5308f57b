"""What the student of a distill step learns: token rows, and the teacher's part in them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_peft.data.blocks import text_blocks
from compress_peft.data.encode import encode_example, padding_id
from compress_peft.errors import UserError
from compress_peft.training.batches import TokenPair, encode_all
from compress_peft.training.distillation.cache import TeacherCache, position_bytes
from compress_peft.training.distillation.generate import Responses
from compress_peft.training.distillation.objective import Teacher
from compress_peft.training.distillation.rows import in_turn, row_key, task_weights, text_rows
from compress_peft.training.distillation.uld import OtherTokensTeacher
from pipelines.plan import ModelShape, meta_model
from pipelines.state import RunState
from pipelines.steps.base import Step
from pipelines.teacher import TeacherFolder, find_teacher, refuse_other_tokens, vocabulary_problem

if TYPE_CHECKING:
    from pipelines.steps.distill import Distill

CACHED_TOKENS = 256
"""What is left out of a divergence falls slowly with the number of tokens, what they take on disk grows with it."""


@dataclass
class Lesson:
    """Rows to train on and to validate with, the teacher or its scores, and what the report says of them."""

    train: list[TokenPair]
    validation: list[TokenPair]
    vocabulary: int
    teacher: Teacher | TeacherCache | OtherTokensTeacher | None = None
    weights: dict[bytes, float] = field(default_factory=dict)
    together: int = 1
    facts: dict[str, Any] = field(default_factory=dict)


class _Loaded:
    """The teacher, loaded when it is needed first, so that a resumed run does not load it in vain."""

    def __init__(self, found: TeacherFolder, state: RunState):
        self.found, self.state = found, state
        self._model: Any = None

    def model(self) -> Any:
        if self._model is None:
            self._model = self.found.load(self.state)
        return self._model

    def free(self) -> None:
        self._model = None
        gc.collect()
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(step: Distill, state: RunState, folder: Path) -> Lesson:
    """Everything that comes before training; with a cache the teacher is gone from memory when it ends."""
    tokenizer = state.tokenizer()
    work = folder / "checkpoints" / "teacher"
    began = time.monotonic()
    if not step.needs_teacher:
        lesson = _rows(step, state, work, None)
        return lesson
    found = find_teacher(step.teacher, state, folder)
    if step.same_tokens:
        refuse_other_tokens(tokenizer, found.tokenizer(state.recipe.model.trust_remote_code), "teacher")
    state.forget_model()  # the student comes when the teacher has gone
    loaded = _Loaded(found, state)
    lesson = _rows(step, state, work, loaded)
    facts: dict[str, Any] = {"name": found.name, "sha256": found.fingerprint()}
    if step.compares and not step.same_tokens:
        lesson.teacher = _other_tokens(step, state, found, loaded)
    elif step.compares and step.live:
        lesson.teacher = Teacher(loaded.model(), lesson.vocabulary, step.temperature, step.top_k)
    elif step.compares:
        top_k = min(step.top_k or CACHED_TOKENS, lesson.vocabulary - 1)
        identity = {"teacher": facts["sha256"], "temperature": step.temperature, "vocabulary": lesson.vocabulary}
        cache = TeacherCache(work, [*lesson.train, *lesson.validation], identity, top_k)
        root = work if step.cache is None else Path(step.cache).expanduser()
        cache.folder = root / f"scores-{cache.key[:16]}"
        missing = len(cache.missing())
        if missing:
            teacher = Teacher(loaded.model(), lesson.vocabulary, step.temperature, top_k)
            cache.fill(teacher.events, padding_id(tokenizer), step.score_batch_size, state.device)
        cache.open()
        lesson.teacher = cache
        facts |= {"top_k": top_k, "cache_bytes": cache.size(), "cache_rows": len(cache.rows), "shards_scored": missing}
    if not step.live:
        loaded.free()
    facts["seconds"] = time.monotonic() - began
    lesson.facts["teacher"] = facts
    return lesson


def _other_tokens(step: Distill, state: RunState, found: TeacherFolder, loaded: _Loaded) -> OtherTokensTeacher:
    """The teacher with the responses of the data in its own tokens."""
    own, data, settings = state.tokenizer(), state.data(), state.data_settings()
    other = found.tokenizer(state.recipe.model.trust_remote_code)

    def encoded(tokenizer: PreTrainedTokenizerBase) -> list[TokenPair]:
        return encode_all(tokenizer, [*data.train, *data.validation], settings.max_length, step.training.eos)

    rows = {row_key(*pair): theirs for pair, theirs in zip(encoded(own), encoded(other), strict=True)}
    return OtherTokensTeacher(loaded.model(), rows, padding_id(other), len(other))


def _rows(step: Distill, state: RunState, work: Path, teacher: _Loaded | None) -> Lesson:
    tokenizer, data, settings = state.tokenizer(), state.data(), state.data_settings()
    length, eos = settings.max_length, step.training.eos
    weights: dict[bytes, float] = {}
    if step.data == "text":
        train, validation = (
            text_rows(text_blocks(tokenizer, [item.text for item in part], step.block_size, where="block_size"))
            for part in (data.train, data.validation)
        )
    else:
        validation = encode_all(tokenizer, data.validation, length, eos)
        train = encode_all(tokenizer, data.train, length, eos)
    if step.data == "teacher_responses":
        assert teacher is not None
        train = _written(step, state, work / "responses", teacher, [item.prompt for item in data.train])
    if step.rationales is not None:
        given = step.rationales
        texts = [item.rationale for item in data.train]
        if given.source == "teacher":
            assert teacher is not None
            questions = [given.question.format(prompt=item.prompt, response=item.response) for item in data.train]
            rows = _written(step, state, work / "rationales", teacher, questions)
            texts = [str(tokenizer.decode(response, skip_special_tokens=True)) for _, response in rows]
        answers = given.answers(tokenizer, data.train, length, eos)
        validation = given.answers(tokenizer, data.validation, length, eos)
        reasons = given.reasons(tokenizer, data.train, texts, length)
        weights = task_weights(answers, reasons, given.share)
        train = in_turn(answers, reasons)
    counts = [sum(len(response) for _, response in part) for part in (train, validation)]
    facts = {"rows": [len(train), len(validation)], "target_tokens": counts}
    together = 1 if step.rationales is None else 2
    return Lesson(train, validation, len(tokenizer), weights=weights, together=together, facts=facts)


def _written(step: Distill, state: RunState, work: Path, teacher: _Loaded, prompts: Sequence[str]) -> list[TokenPair]:
    """The prompts, as the student reads them, with what the teacher writes."""
    tokenizer, length = state.tokenizer(), state.data_settings().max_length
    other = teacher.found.tokenizer(state.recipe.model.trust_remote_code)
    room = length - step.generation.max_new_tokens
    asked = [encode_example(other, prompt, "", max_length=room, eos=False)[0] for prompt in prompts]
    if step.cache is not None:
        work = Path(step.cache).expanduser()
    responses = Responses(work, asked, step.generation, teacher.found.fingerprint())
    responses.folder = work / f"responses-{responses.key[:16]}"
    if responses.missing():
        responses.fill(teacher.model(), other)
    written = responses.read()
    if not vocabulary_problem(tokenizer, other):
        return [(prompt, response) for prompt, response in zip(asked, written, strict=True) if response]
    rows = []
    for prompt, response in zip(prompts, written, strict=True):
        text = str(other.decode(response, skip_special_tokens=True))
        rows.append(
            encode_example(tokenizer, prompt, text, max_length=length, eos=response[-1:] == [other.eos_token_id])
        )
    return rows


def other_model(teacher: str | int, shape: ModelShape) -> float | None:
    """Bytes of a teacher that is no stage of this run: 0 where they are not known yet; None for a stage."""
    recipe = shape.recipe
    if recipe is None or str(teacher) == "original" or str(teacher).isdecimal():
        return None
    if teacher in [step.label() for step in recipe.steps if isinstance(step, Step)]:
        return None
    settings = recipe.model.model_copy(update={"source": str(teacher), "config": None})
    try:
        model: nn.Module | None = meta_model(recipe.model_copy(update={"model": settings}))[0]
    except UserError:
        model = None
    return 0.0 if model is None else sum(p.numel() for p in model.parameters()) * float(shape.bytes_each)


def cache_bytes(step: Distill, shape: ModelShape, length: int) -> tuple[float, str]:
    """At most, as if every token of every row counted (0 where the number of rows is not known yet), and in words."""
    each = position_bytes(step.top_k or CACHED_TOKENS)
    splits = shape.recipe.data.splits if shape.recipe is not None and shape.recipe.data is not None else None
    if step.data == "text" or splits is None or splits.separate:
        return 0.0, f"{each} bytes of disk a predicted token, not counted here: how many there are is not known yet"
    rows = (splits.train * (2 if step.rationales else 1) + splits.validation) * length
    return float(rows * each), f"up to {rows * each / 2**20:.1f} MiB of disk ({each} bytes a predicted token)"
