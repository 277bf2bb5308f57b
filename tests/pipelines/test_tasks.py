"""A run that trains on one data set and is scored on further ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from compress_peft.errors import ConfigError
from eval.records import RunReport
from pipelines.recipe import parse_recipe
from pipelines.run import EXIT_DONE, main
from pipelines.runner import resolved
from pipelines.schema import recipe_schema
from tests.eval.test_dialogue import ROWS, write
from tests.eval.test_judge import Judge, server  # noqa: F401  a fixture
from tests.pipelines.conftest import write_examples, write_recipe


def sums(path: Path) -> Path:
    rows = [{"question": f"What is {i} and {i + 1}?", "answer": f"Add. #### {2 * i + 1}"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def with_tasks(recipe: dict[str, Any], folder: Path, address: str) -> dict[str, Any]:
    """The recipe with other examples of the same classes, sums and dialogues beside its own test split."""
    other = {key: recipe["data"][key] for key in ("prompt", "response", "max_length")}
    recipe["steps"] = recipe["steps"][:2]
    recipe["evaluate"]["tasks"] = [
        {
            "name": "other",
            "data": {
                **other,
                "source": str(write_examples(folder / "other.jsonl", 200, 9)),
                "choices": ["warm", "cold", "calm"],
                "splits": {"test": 9},
            },
        },
        {"data": {"preset": "gsm8k", "source": str(sums(folder / "sums.jsonl")), "splits": {"test": 6}}},
        {
            "data": {
                "preset": "mt_bench",
                "source": str(write(folder / "question.jsonl")),
                "splits": {"test": 2},
                "chat": "plain",
                "max_length": 200,
            },
            "max_new_tokens": 4,
            "judge": {"endpoint": address, "model": "j"},
        },
    ]
    recipe["evaluate"]["tasks"][1]["max_new_tokens"] = 4
    return recipe


def test_every_stage_is_scored_on_all_tasks(recipe: dict[str, Any], server: Judge, tmp_path: Path) -> None:  # noqa: F811
    server.say = lambda prompt: "[[4]]"
    raw = with_tasks(recipe, tmp_path, server.address)
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, raw)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    assert len(report.stages) == 3
    for stage in report.stages:
        sizes = {(score.task, score.metric): score.n for score in stage.accuracies}
        assert sizes[(recipe["data"]["source"], "choice")] == 24 and sizes[("other", "choice")] == 9
        assert {n for (task, _), n in sizes.items() if task.startswith("GSM8K")} == {6}
        grades = {score.metric: score.value for score in stage.texts if score.task.startswith("MT-Bench")}
        assert grades["judge's grade, turn 2"] == 4 and len(stage.judgements) == 2 * len(ROWS[0]["turns"])
    assert [[split.name for split in data.splits] for data in report.data[1:]] == [["test"]] * 3
    assert "other" in (out / "report.md").read_text()


def test_a_preset_lies_beneath_the_task(recipe: dict[str, Any], tmp_path: Path) -> None:
    parsed = parse_recipe(with_tasks(recipe, tmp_path, "http://127.0.0.1:9/v1"))
    other, gsm8k, mt_bench = parsed.evaluate.tasks
    assert gsm8k.metrics == ("gsm8k",) and gsm8k.stop == ("Question:",) and gsm8k.max_new_tokens == 4
    assert mt_bench.judge.reference and mt_bench.judge.model == "j"
    assert other.data.splits.train == other.data.splits.validation == 0 and other.metrics is None
    assert parse_recipe(resolved(parsed)) == parsed


def test_the_name_of_a_preset_is_enough(recipe: dict[str, Any]) -> None:
    recipe["evaluate"]["tasks"] = ["boolq"]
    (task,) = parse_recipe(recipe).evaluate.tasks
    assert task.data.preset == "boolq" and task.data.choices
    validator = Draft202012Validator(recipe_schema())
    assert validator.is_valid(recipe)
    recipe["evaluate"]["tasks"] = ["bool"]
    assert not validator.is_valid(recipe)
    with pytest.raises(ConfigError, match=r'evaluate\.tasks\[0\]: there is no preset "bool": did you mean "boolq"'):
        parse_recipe(recipe)


def test_text_that_is_trained_on_is_no_task(recipe: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    raw = with_tasks(recipe, tmp_path, "http://127.0.0.1:9/v1")
    raw["evaluate"]["tasks"] = raw["evaluate"]["tasks"][:1]
    raw["evaluate"]["tasks"][0]["data"]["source"] = str(write_examples(tmp_path / "same.jsonl", 80, 60))
    raw["evaluate"]["tasks"][0]["data"]["splits"] = {"test": 60}
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, raw)), "--output", str(out)]) != EXIT_DONE
    said = capsys.readouterr().err
    assert "evaluate.tasks[0].data" in said and "part of the training or validation split" in said
    assert not list((out / "stages").glob("*")) if out.exists() else True


def test_what_is_wrong_with_a_task_is_told_by_its_key(recipe: dict[str, Any], tmp_path: Path) -> None:
    raw = with_tasks(recipe, tmp_path, "http://127.0.0.1:9/v1")
    tasks = raw["evaluate"]["tasks"]
    tasks[0]["data"]["source"] = str(tmp_path / "away.jsonl")
    tasks[2]["judge"] = None
    with pytest.raises(ConfigError) as error:
        parse_recipe(raw)
    assert [problem.where for problem in error.value.problems] == ["evaluate.tasks[2]"]
    tasks[1]["data"]["promt"] = "x"
    del tasks[0]["data"]["splits"]
    with pytest.raises(ConfigError) as error:
        parse_recipe(raw)
    places = {problem.where for problem in error.value.problems}
    assert {"evaluate.tasks[1].data.promt", "evaluate.tasks[0].data.splits"} <= places


def test_the_plan_names_tasks_and_what_they_lack(recipe: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    raw = with_tasks(recipe, tmp_path, "http://127.0.0.1:9/v1")
    raw["evaluate"]["tasks"][0]["data"]["source"] = str(tmp_path / "away.jsonl")
    main([str(write_recipe(tmp_path, raw)), "--dry-run", "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "scored on    preset gsm8k on" in said.out and "test 6" in said.out
    assert "evaluate.tasks[0].data.source" in said.out + said.err
    two = raw["evaluate"]["tasks"][:1] * 2
    two[0]["data"]["source"] = str(tmp_path / "other.jsonl")
    raw["evaluate"]["tasks"] = two
    assert main([str(write_recipe(tmp_path, raw)), "--output", str(tmp_path / "out2")]) != EXIT_DONE
    assert 'two tasks are called "other"' in capsys.readouterr().err
