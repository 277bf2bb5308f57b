"""What is measured at a stage of a run."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from compress_peft.data.blocks import text_blocks
from compress_peft.data.chat import PLAIN_STOP
from compress_peft.errors import DataError, Problem
from compress_peft.loading import load
from compress_peft.models.layers import is_encoder_decoder
from eval.answer_loss import answer_loss
from eval.choices import evaluate_choices
from eval.costs import Latency, Memory, MemoryEstimate, Storage
from eval.dialogue import answer_turns
from eval.fidelity import fidelity, write_reference
from eval.forward import transformers_model
from eval.generation import generate_answers
from eval.judge import judge_answers, unparsed_note
from eval.memory import estimate_inference
from eval.perplexity import perplexity
from eval.profile import ProfileSettings, profile_folder
from eval.records import Accuracy, AnswerLoss, Fidelity, HarnessScore, Judgement, Perplexity, StageRecord, TextScore
from eval.storage import folder_bytes, measure_storage
from eval.text_metrics import score_answers
from pipelines.state import RunState
from pipelines.tasks import ScoredTask, digest

DISTURBING = 0.1
"""Share of the processors' time used by other programs from which on a measurement of speed is said to be disturbed."""

DEFAULT_METRIC = {"text": "exact_match", "gsm8k": "gsm8k"}


def measure(state: RunState, name: str, quality_only: bool = False) -> StageRecord:
    """Everything that the recipe asks for, of the model as it stands on disk.

    quality_only: leave out memory and latency (for alternatives whose shape is that of a measured stage).
    """
    started = time.monotonic()
    settings = state.recipe.evaluate
    folders = [state.backbone] + ([state.adapter] if state.adapter else [])
    memory: Memory | None = None
    latency: Latency | None = None
    if settings.profile is not None and not quality_only:
        wanted = ProfileSettings(
            prompt_tokens=settings.profile.prompt_tokens,
            new_tokens=settings.profile.new_tokens,
            batch=settings.profile.batch_size,
            repeats=settings.profile.repeats,
            batches=settings.profile.grid.batch_size,
            prompts=settings.profile.grid.prompt_tokens,
            beams=settings.profile.grid.num_beams,
            device=str(state.device),
            dtype=str(state.dtype).removeprefix("torch."),
        )
        state.forget_model()  # two copies of the model at once would not fit where one does
        memory, latency = profile_folder(state.backbone, wanted, adapter=state.adapter)
    model, tokenizer = state.model()
    storage = measure_storage(model).model_copy(update={"disk_bytes": sum(folder_bytes(path) for path in folders)})
    if memory is not None:
        memory = memory.model_copy(update={"estimate": _estimate(model, storage, memory, settings.profile, state)})
    accuracies, texts, judgements = _task_scores(state, model, tokenizer)
    return StageRecord(
        name=name,
        accuracies=accuracies,
        texts=texts,
        judgements=judgements,
        perplexity=_perplexity(state, model, tokenizer),
        answer_loss=_answer_loss(state, model, tokenizer),
        fidelity=None if quality_only else measure_fidelity(state, tokenizer),
        harness=_harness(state, model, tokenizer),
        storage=storage,
        memory=memory,
        latency=latency,
        seconds=time.monotonic() - started,
        notes=unparsed_note(judgements) + _load_note(latency),
    )


def _load_note(latency: Latency | None) -> tuple[str, ...]:
    if latency is None or (latency.other_load or 0.0) < DISTURBING:
        return ()
    return (f"other programs used {latency.other_load:.0%} of the processors while speed was measured",)


def _estimate(model: Any, storage: Storage, memory: Memory, profile: Any, state: RunState) -> MemoryEstimate:
    """What the profile should take, beside what it took."""
    return estimate_inference(
        transformers_model(model),
        storage.memory_bytes,
        batch=profile.batch_size,
        prompt=profile.prompt_tokens,
        new=profile.new_tokens,
        bytes_each=state.dtype.itemsize,
        compressed=storage.quantized_layers > 0,
        baseline=memory.baseline_bytes,
    )


def _task_scores(
    state: RunState, model: Any, tokenizer: Any
) -> tuple[tuple[Accuracy, ...], tuple[TextScore, ...], tuple[Judgement, ...]]:
    found = [_scores_of(task, state.folder / "judge", model, tokenizer) for task in state.tasks()]
    return (
        tuple(score for accuracies, _, _ in found for score in accuracies),
        tuple(score for _, texts, _ in found for score in texts),
        tuple(judgement for _, _, judgements in found for judgement in judgements),
    )


def _scores_of(
    scored: ScoredTask, judge_folder: Path, model: Any, tokenizer: Any
) -> tuple[tuple[Accuracy, ...], tuple[TextScore, ...], tuple[Judgement, ...]]:
    settings, data, task = scored.settings, scored.data, scored.name
    examples = scored.test[: settings.limit]
    length = data.max_length
    chosen: tuple[Accuracy, ...] = ()
    if examples[0].choices and settings.metrics is None:
        chosen = evaluate_choices(
            model, tokenizer, examples, batch_size=settings.batch_size, max_length=length, task=task
        )
        lengths = {len(tokenizer(choice, add_special_tokens=False).input_ids) for choice in examples[0].choices}
        chosen = chosen if len(lengths) > 1 else chosen[:1]  # equal lengths: normalization changes nothing
        if settings.judge is None:
            return chosen, (), ()
    generate = functools.partial(
        generate_answers,
        model,
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        stop=settings.stop + ((PLAIN_STOP,) if data.chat == "plain" else ()),
        batch_size=settings.batch_size,
        max_length=length + settings.max_new_tokens,
    )
    if data.follow_ups is not None:
        assert data.chat is not None and settings.judge is not None, "refused when the recipe is read"
        new = settings.max_new_tokens
        turns = answer_turns(generate, tokenizer, examples, data.chat, max_length=length, max_new_tokens=new)
        grades, judgements = judge_answers(settings.judge, turns, examples, task, judge_folder)
        return (), grades, judgements
    answers = generate(examples)
    metrics = () if chosen else settings.metrics or (DEFAULT_METRIC[settings.answer],)
    accuracies, texts = score_answers(answers, examples, metrics, task)
    if settings.judge is None:
        return accuracies, texts, ()
    each = [(answer,) for answer in answers]
    grades, judgements = judge_answers(settings.judge, each, examples, task, judge_folder)
    return chosen + accuracies, texts + grades, judgements


def _perplexity(state: RunState, model: Any, tokenizer: Any) -> Perplexity | None:
    settings = state.recipe.evaluate.perplexity
    if settings is None or is_encoder_decoder(model):
        return None
    documents = held_out_documents(state, settings.text)
    if documents is None:
        return None
    return perplexity(
        model,
        tokenizer,
        documents,
        block_size=settings.block_size,
        max_blocks=settings.blocks,
        batch_size=settings.batch_size,
    )


def _answer_loss(state: RunState, model: Any, tokenizer: Any) -> AnswerLoss | None:
    """Where perplexity is asked for and the model, an encoder-decoder, has none."""
    settings = state.recipe.evaluate
    if settings.perplexity is None or state.recipe.data is None or not is_encoder_decoder(model):
        return None
    examples = state.data().test[: settings.task.limit if settings.task else None]
    return answer_loss(model, tokenizer, examples, max_length=state.data_settings().max_length)


def measure_fidelity(state: RunState, tokenizer: Any) -> Fidelity | None:
    """Against the original model, whose answers are worked out once and kept in the run folder.

    Raises:
        DataError: the text does not fill a block, or a block exceeds the model's positions.
    """
    settings = state.recipe.evaluate.fidelity
    documents = None if settings is None else held_out_documents(state, settings.text, "evaluate.fidelity.text")
    if settings is None or documents is None:
        return None
    blocks = text_blocks(tokenizer, documents, settings.block_size, settings.blocks, where="evaluate.fidelity")
    limit = getattr(state.model()[0].config, "max_position_embeddings", None)
    needed = max(settings.block_size, settings.block_size // 2 + settings.new_tokens)
    if limit is not None and needed > limit:
        what = f"{needed} tokens exceed the model's {limit} positions"
        raise DataError(Problem("evaluate.fidelity", what, "lower block_size or new_tokens"))
    reference = state.folder / "original_answers"
    if not reference.exists():
        if state.backbone == state.source.folder and state.adapter is None:
            original = state.model()[0]
        else:  # the folder was removed, or the first stage was taken from another run
            code = state.recipe.model.trust_remote_code
            original, _ = load(state.source.folder, state.device, state.dtype, trust_remote_code=code)
        write_reference(original, blocks, settings.new_tokens, reference)
    return fidelity(state.model()[0], blocks, settings.new_tokens, reference)


def _harness(state: RunState, model: Any, tokenizer: Any) -> tuple[HarnessScore, ...]:
    settings = state.recipe.evaluate.lm_eval
    if settings is None:
        return ()
    from eval.harness import run_harness  # lm-eval is optional and takes seconds to import

    include = Path(settings.include_path).expanduser() if settings.include_path else None
    return run_harness(
        model,
        tokenizer,
        settings.tasks,
        include_path=include,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        batch_size=settings.batch_size,
        seed=state.recipe.seed,
    )


def check_texts(state: RunState) -> None:
    """Refuse, before anything is done, text that the model would be trained on.

    Raises:
        DataError: see `held_out_documents` and `scored_tasks`.
    """
    settings = state.recipe.evaluate
    state.tasks()
    for where, section in (("perplexity", settings.perplexity), ("fidelity", settings.fidelity)):
        if section is not None:
            held_out_documents(state, section.text, f"evaluate.{where}.text")


def held_out_documents(state: RunState, text: str, where: str = "evaluate.perplexity.text") -> list[str] | None:
    """The texts to measure on; None where the recipe has no data and names no file.

    text: "test", or a file. where: the setting to name in errors.

    Raises:
        DataError: a document is part of the training split too.
    """
    if text != "test":
        documents = [Path(text).expanduser().read_text(encoding="utf-8")]
    elif state.recipe.data is None:
        return None
    else:
        documents = list(dict.fromkeys(example.text for example in state.data().test))  # many questions, one passage
    if state.recipe.data is not None:
        trained = {digest(example.text) for example in state.data().train}
        shared = sum(digest(document) in trained for document in documents)
        if shared:
            what = f"{shared} of its {len(documents)} documents are part of the training split"
            raise DataError(Problem(where, what, "use text that the model is not trained on"))
    return documents
