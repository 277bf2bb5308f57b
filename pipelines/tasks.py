"""What a run is scored on: the test split of its own data, and further tasks with data of their own."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from compress_peft.data.build import DataSettings, TaskData, build_data
from compress_peft.data.examples import Example
from compress_peft.errors import DataError, Problem


class ScoredTask(NamedTuple):
    """settings: `evaluate.task`, or one of `evaluate.tasks`. name: in the report."""

    name: str
    settings: Any
    data: DataSettings
    built: TaskData

    @property
    def test(self) -> tuple[Example, ...]:
        return self.built.test


def scored(recipe: Any) -> list[tuple[str, Any, DataSettings]]:
    """(key, how it is scored, its data) of every task: that of the recipe's own data, then the further ones."""
    evaluate = recipe.evaluate
    own = evaluate.task is not None and recipe.data is not None
    first = [("evaluate.task", evaluate.task, recipe.data)] if own else []
    return first + [(f"evaluate.tasks[{index}]", task, task.data) for index, task in enumerate(evaluate.tasks)]


def scored_tasks(recipe: Any, own: TaskData | None, tokenizer: PreTrainedTokenizerBase) -> list[ScoredTask]:
    """All tasks that the recipe scores, its own data's first.

    Raises:
        DataError: two tasks have one name, or a further one tests on what the model is trained on; and as `build_data`.
    """
    found: list[ScoredTask] = []
    learned = [] if own is None else [*own.train, *own.validation]
    trained = {digest(text) for example in learned for text in (example.prompt, example.text)}
    for where, settings, data in scored(recipe):
        if data is recipe.data and own is not None:
            found.append(ScoredTask(own.origin.name, settings, data, own))
            continue
        built = build_data(data, tokenizer)
        name = settings.name or built.origin.name
        if name in {task.name for task in found}:
            raise DataError(Problem(f"{where}.name", f'two tasks are called "{name}"', "give this one another name"))
        shared = sum(not trained.isdisjoint({digest(test.prompt), digest(test.text)}) for test in built.test)
        if shared:
            what = f"{shared} of its {len(built.test)} test examples are part of the training or validation split"
            raise DataError(Problem(f"{where}.data", what, "test on text that the model is not trained on"))
        found.append(ScoredTask(name, settings, data, built))
    return found


def digest(text: str) -> bytes:
    """The same for texts that agree but for white space and case."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
