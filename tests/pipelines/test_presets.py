"""A preset in a recipe: its evaluation and hyper-parameters, under the recipe's own keys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from compress_peft.adapters import ADAPTERS
from compress_peft.data.build import TaskData
from compress_peft.data.datasets import Origin
from compress_peft.data.examples import Example
from compress_peft.errors import ConfigError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.training.settings import TrainingSettings
from pipelines import measure, methods, rank_search
from pipelines.plan import _data_lines
from pipelines.recipe import parse_recipe
from pipelines.schema import recipe_schema
from pipelines.tasks import scored_tasks
from tests.conftest import build_tiny_llama

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke/preset.yaml"


def recipe(data: dict[str, Any], training: dict[str, Any] | None = None, **changes: Any) -> Any:
    steps = [{"step": "finetune", "adapter": "lora"} | ({} if training is None else {"training": training})]
    return parse_recipe({"model": {"source": "random"}, "data": data, "steps": steps} | changes)


FILE = {"source": str(SMOKE.with_name("topics.jsonl")), "splits": {"train": 40, "validation": 8, "test": 8}}


def test_metrics_generation_and_training_come_from_the_preset() -> None:
    found = recipe({"preset": "squad", **FILE})
    task, training = found.evaluate.task, found.steps[0].training
    assert (task.metrics, task.max_new_tokens, task.num_beams, task.stop) == (("exact_match", "f1"), 32, 3, ("\n",))
    assert training.batch_size * training.gradient_accumulation == 128 and training.learning_rate == 1e-4
    assert recipe({"preset": "e2e", **FILE}).steps[0].training.learning_rate == 3e-6
    assert recipe({"preset": "copa", **FILE}).evaluate.perplexity is None


def test_own_keys_override_the_preset() -> None:
    own = {"task": {"num_beams": 1}, "profile": None}
    found = recipe({"preset": "squad", **FILE}, {"batch_size": 8, "max_steps": 9}, evaluate=own)
    assert (found.evaluate.task.num_beams, found.evaluate.task.max_new_tokens, found.evaluate.profile) == (1, 32, None)
    training = found.steps[0].training
    assert (training.batch_size, training.gradient_accumulation, training.max_steps) == (8, 1, 9)
    assert recipe({"preset": "squad", **FILE}, evaluate={"task": None}).evaluate.task is None
    plain = recipe({**FILE, "prompt": "{text}", "response": "{label}"})
    assert plain.evaluate.task.stop == () and plain.steps[0].training.gradient_accumulation == 1


def test_a_resolved_recipe_is_the_same_recipe() -> None:
    found = recipe({"preset": "boolq", "splits": {"train": 50}})
    assert found.data.splits.train.count == 50 and found.data.splits.train.source == "train"
    again = type(found).model_validate(found.model_dump(mode="json", by_alias=True))
    assert again.data == found.data and again.evaluate == found.evaluate


def test_an_unknown_preset_is_one_problem() -> None:
    with pytest.raises(ConfigError, match=r'data: there is no preset "gsm": did you mean "gsm8k"') as caught:
        recipe({"preset": "gsm", **FILE})
    assert len(caught.value.problems) == 1


def test_the_plan_names_the_preset() -> None:
    found = parse_recipe(yaml.safe_load(SMOKE.read_text()))
    (line,) = _data_lines(found)
    assert "preset cnn_dailymail on ./configs/smoke/topics.jsonl: train 48" in line


def test_the_evaluator_generates_and_scores_as_the_preset_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe({"preset": "coqa", **FILE})
    answers = (Example(f"Q: {i}?\nA:", f" cat {i}", (), "one story", "", (f" cat {i}", "the cat")) for i in range(3))
    data = TaskData((), (), tuple(answers), Origin("CoQA", ""), 0)
    state: Any = SimpleNamespace(recipe=found, folder=Path(), data=lambda: data)
    state.tasks = lambda: scored_tasks(found, data, None)
    asked: dict[str, Any] = {}

    def generate(model: Any, tokenizer: Any, examples: Any, **settings: Any) -> list[str]:
        asked.update(settings)
        return ["the cat", "cat 1", "dog"]

    monkeypatch.setattr(measure, "generate_answers", generate)
    accuracies, texts, _ = measure._task_scores(state, None, None)
    assert (asked["max_new_tokens"], asked["num_beams"], asked["stop"]) == (32, 1, ("\n",))
    # of two people's answers the one that is left is met by half
    assert accuracies == () and [score.metric for score in texts] == ["EM (CoQA)", "F1 (CoQA)"]
    assert texts[0].scores == (0.5, 0.5, 0.0)
    assert measure.held_out_documents(state, "test") == ["one story"]  # however many questions it has


def test_the_search_of_a_rank_keeps_all_answers_to_a_prompt_on_one_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[set[str]] = []

    def train(model: Any, tokenizer: Any, training: Any, validation: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend({item.prompt for item in part} for part in (training, validation))
        return SimpleNamespace(progress=SimpleNamespace(seconds=1.0, best_loss=1.0))

    monkeypatch.setattr(rank_search, "train", train)
    examples = [Example(f"prompt {i // 4}", f" answer {i}") for i in range(40)]
    adapter, tokenizer, settings = ADAPTERS.create("lora", r="auto"), byte_tokenizer(), TrainingSettings(max_steps=20)
    search: Any = rank_search.RankSearch()
    rank_search.choose_rank(
        adapter, build_tiny_llama(), tokenizer, examples, settings, search, max_length=32, seed=0, folder=tmp_path
    )
    assert asked and all(not training & held_out for training, held_out in zip(asked[::2], asked[1::2], strict=True))


@pytest.mark.parametrize(
    "data",
    [{"preset": "squad"}, {"preset": "squad", "source": {"path": "x"}}, {"preset": "squad", "splits": {"train": 9}}],
)
def test_the_schema_takes_presets(data: dict[str, Any]) -> None:
    schema = Draft202012Validator(recipe_schema())
    raw = yaml.safe_load(SMOKE.read_text())
    assert schema.is_valid(raw | {"data": data})
    assert not schema.is_valid(raw | {"data": {"source": "a.jsonl"}})


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["--presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 13
    assert any(line.startswith("| `squad` | 1 |") and "exact_match, f1" in line for line in lines)
