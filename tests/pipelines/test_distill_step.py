"""The distill step: from YAML to an adapter or a model, with every kind of lesson, killed and resumed, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

from compress_peft.errors import ConfigError
from compress_peft.models.random_model import BYTE_VOCABULARY, byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.training.distillation.cache import TeacherCache
from compress_peft.training.distillation.objective import Objective
from eval.records import RunReport
from pipelines.recipe import parse_recipe
from pipelines.run import EXIT_DONE, EXIT_USER, main
from pipelines.schema import recipe_schema
from tests.conftest import build_tiny_llama
from tests.pipelines.conftest import TOPICS, write_recipe

SCHEMA = Draft202012Validator(recipe_schema())
REPOSITORY = Path(__file__).resolve().parents[2]
TRAINING = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.01, "eval_steps": 3, "patience": None}
DISTILL = {"step": "distill", "adapter": {"method": "lora", "r": 2}, "training": TRAINING}
NF4 = {"step": "quantize", "method": "nf4"}
PRUNE = {"step": "prune", "method": "magnitude", "sparsity": 0.5}


@pytest.fixture
def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """Nothing is measured."""
    recipe["data"]["splits"] = {"train": 20, "validation": 6, "test": 6}
    recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
    return recipe


def facts(out: Path, number: int) -> dict[str, Any]:
    return json.loads(next(out.glob(f"steps/{number:02d}-*/result.json")).read_text())["facts"]


def run(recipe: dict[str, Any], folder: Path, *steps: dict[str, Any], out: str = "out") -> dict[str, Any]:
    """The facts of the last step."""
    path = write_recipe(folder, recipe | {"steps": list(steps)})
    assert main([str(path), "--output", str(folder / out)]) == EXIT_DONE
    return facts(folder / out, len(steps))


def learns(found: dict[str, Any]) -> bool:
    losses = [entry["loss"] for entry in found["curves"]["losses"]]
    return losses[-1] < losses[0]


@pytest.mark.long
def test_the_smoke_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_PEFT_CACHE", str(tmp_path / "cache"))
    recipe = yaml.safe_load((REPOSITORY / "configs/smoke/prune_distill_merge.yaml").read_text())
    recipe["data"]["source"] = str(REPOSITORY / recipe["data"]["source"])
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    found = {stage.name: stage.perplexity.value for stage in report.stages if stage.perplexity}
    assert found["original"] < found["distilled (lora)"] < found["pruned (magnitude 50%)"]
    assert found["distilled (lora)"] == found["merged (bundle)"]
    details = report.steps[1].details
    assert details["teacher"]["name"] == "original" and details["teacher"]["top_k"] == 32
    assert details["target_tokens"][0] == details["rows"][0] * 63
    assert details["teacher"]["cache_bytes"] > sum(details["target_tokens"]) * 260
    assert report.curves and not list(out.glob("steps/*/checkpoints"))


@pytest.mark.process
def test_a_killed_step_goes_on_to_the_same_bytes(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the teacher scores, and while the student trains; dropout is on."""
    monkeypatch.setattr("compress_peft.training.distillation.cache.ROWS_PER_SHARD", 8)
    adapter = {"method": "lora", "r": 2, "lora_dropout": 0.2}
    step = DISTILL | {"adapter": adapter, "training": TRAINING | {"checkpoint_steps": 2}, "score_batch_size": 4}
    run(small, tmp_path, NF4, step, out="whole")
    path, out = tmp_path / "recipe.yaml", tmp_path / "cut"

    class Killed(BaseException):
        pass

    def dying(function: Any, calls: int) -> Any:
        left = [calls]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    loads = []
    for owner, name, calls in ((TeacherCache, "path", 11), (Objective, "values", 6)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying(getattr(owner, name), calls))
            with pytest.raises(Killed):
                main([str(path), "--output", str(out), "--resume"])
        loads.append(len(list(out.glob("steps/02-distill/checkpoints/teacher/*/shard-*.safetensors"))))
    assert 0 < loads[0] < 4 == loads[1], "the first kill must hit the middle of the cache"
    assert main([str(path), "--output", str(out), "--resume"]) == EXIT_DONE
    resumed, whole = facts(out, 2), facts(tmp_path / "whole", 2)
    assert resumed["resumed_from_step"] == 2 or resumed["resumed_from_step"] == 4
    assert resumed["teacher"]["shards_scored"] == 0 and whole["teacher"]["shards_scored"] == 4
    name = "steps/02-distill/adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_dense_students_keep_their_zeros(small: dict[str, Any], tmp_path: Path) -> None:
    own = {"loss": "js", "live": True, "on_policy": {"share": 0.5, "max_new_tokens": 4}}
    found = run(small, tmp_path, PRUNE, DISTILL | own | {"adapter": "full"})
    assert learns(found) and found["trainable_parameters"]["trainable"] == found["trainable_parameters"]["total"]
    before, after = (
        load_file(next(tmp_path.glob(f"out/steps/{step}/model/*.safetensors"))) for step in ("01-prune", "02-distill")
    )
    pruned = [name for name in before if name.endswith("_proj.weight")]
    assert len(pruned) == 14 and before.keys() == after.keys()
    for name in pruned:
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])


LESSONS: dict[str, dict[str, Any]] = {
    "an earlier stage, prompt-aware": {"teacher": 1, "adapter": {"method": "para", "r": 4}, "loss": "reverse_kl"},
    "activations": {
        "training": TRAINING | {"learning_rate": 2e-3},
        "live": True,
        "loss": ["hidden_states", {"method": "attention_relations", "weight": 0.5}],
    },
    "the teacher writes": {
        "teacher": "quantized (nf4)",
        "data": "teacher_responses",
        "loss": "hard_labels",
        "generation": {"max_new_tokens": 4},
    },
    "no teacher at all": {"data": "text", "block_size": 32, "loss": "hard_labels", "teacher": "nowhere/at-all"},
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_lessons_on_a_compressed_student(lesson: str, small: dict[str, Any], tmp_path: Path) -> None:
    found = run(small, tmp_path, NF4, DISTILL | LESSONS[lesson])
    assert learns(found) or found["curves"]["losses"][0]["loss"] == 0  # it is its own teacher
    settings = LESSONS[lesson]
    assert ("teacher" in found) == ("nowhere" not in str(settings))
    if "teacher" in found:
        assert found["teacher"]["name"] == ("original" if lesson == "activations" else "quantized (nf4)")
    assert not any(
        "distillation" in key for key in load_file(next(tmp_path.glob("out/steps/02-*/adapter/*.safetensors")))
    )


@pytest.mark.parametrize("source", ["data", "teacher"])
def test_step_by_step(source: str, small: dict[str, Any], tmp_path: Path) -> None:
    rationale = {"rationale": " since {label} is its name"} if source == "data" else {}
    recipe = small | {"data": small["data"] | rationale}
    step = DISTILL | {"loss": "hard_labels", "rationales": {"from": source}, "generation": {"max_new_tokens": 6}}
    found = run(recipe, tmp_path, step)
    assert found["rows"] == [40, 6] and learns(found)
    assert ("teacher" in found) == (source == "teacher")


def test_step_by_step_has_both_tasks_of_a_problem_in_a_batch(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    called = Objective.__call__

    def watch(self: Objective, student: Any, batch: Any) -> torch.Tensor:
        if student.training:
            ends = batch.prompt_end.tolist()
            ids = [row[: end + 1] for row, end in zip(batch.input_ids.tolist(), ends, strict=True)]
            seen.append(byte_tokenizer().batch_decode(ids, skip_special_tokens=True))
        return called(self, student, batch)

    monkeypatch.setattr(Objective, "__call__", watch)
    recipe = small | {"data": small["data"] | {"rationale": " since {label} is its name"}}
    run(recipe, tmp_path, DISTILL | {"loss": "hard_labels", "rationales": {"from": "data"}})
    assert len(seen) == TRAINING["max_steps"]
    for prompts in seen:
        asked = [prompt for prompt in prompts if not prompt.startswith("[rationale] ")]
        assert sorted(prompts) == sorted(asked + ["[rationale] " + prompt for prompt in asked])


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a loss that is not known": ({"loss": "forward_lk"}, ["steps[0].loss", 'did you mean "forward_kl"']),
    "no loss": ({"loss": []}, ["steps[0].loss", "at least 1"]),
    "a setting of a loss": ({"loss": {"method": "js", "betta": 1}}, ["steps[0].loss", 'did you mean "beta"']),
    "no adapter": ({"adapter": ...}, ["steps[0].adapter", "is missing"]),
    "two temperatures": ({"loss": ["js", {"method": "forward_kl", "temperature": 2}]}, ["one temperature"]),
    "activations on disk": ({"loss": "hidden_states"}, ["live: true"]),
    "a cache that is not used": ({"live": True, "cache": "x"}, ["cache", "live"]),
    "PARA on text": ({"adapter": {"method": "para"}, "data": "text"}, ["no prompts", "data: responses"]),
    "reasons on text": ({"rationales": {}, "data": "text"}, ["rationales", "text"]),
    "half a problem in a step": (
        {"loss": "hard_labels", "rationales": {}, "training": TRAINING | {"batch_size": 3}},
        ["training.batch_size", "3 rows", "even"],
    ),
    "own answers, cached": ({"on_policy": 0.5}, ["on_policy", "live: true"]),
    "own answers as labels": (
        {"on_policy": 0.5, "live": True, "loss": ["js", "hard_labels"]},
        ["leave hard_labels out"],
    ),
    "own answers to no prompts": ({"on_policy": 0.5, "live": True, "data": "text"}, ["data: responses"]),
    "other tokens, cached": ({"loss": ["hard_labels", "uld"]}, ["uld", "live: true"]),
    "other tokens and the same": ({"loss": ["js", "uld"], "live": True}, ["uld", "other tokens"]),
    "a later stage": ({"teacher": 1}, ["steps[0].teacher", "is step 1, and 0 steps"]),
    "no such teacher": ({"teacher": "quantised (nf4)"}, ["steps[0].teacher", '"original"', "quantised"]),
}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({"adapter": "lora"}, True),
        ({"adapter": "full"}, True),
        ({"adapter": None}, True),
        ({"adapter": "lorra"}, False),
        ({"loss": "js"}, True),
        ({"loss": {"method": "js", "beta": 0.2}}, True),
        ({"loss": ["js", {"method": "hard_labels"}]}, True),
        ({"loss": []}, False),
        ({"loss": ["jss"]}, False),
    ],
    ids=str,
)
def test_names_for_methods_in_parser_and_schema(change: dict[str, Any], right: bool, recipe: dict[str, Any]) -> None:
    raw = recipe | {"steps": [DISTILL | change]}
    assert SCHEMA.is_valid(raw) == right
    if right:
        assert parse_recipe(raw).steps[0].loss[0].method == ("js" if "loss" in change else "forward_kl")
    else:
        with pytest.raises(ConfigError) as error:
            parse_recipe(raw)
        assert len(error.value.problems) == 1


@pytest.mark.parametrize("case", WRONG)
def test_refusals_of_the_recipe(case: str, recipe: dict[str, Any]) -> None:
    change, expected = WRONG[case]
    step = {key: value for key, value in (DISTILL | change).items() if value is not ...}
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe | {"steps": [step]})
    assert all(part in str(error.value) for part in expected), str(error.value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([NF4, DISTILL | {"adapter": None}], "codes have no gradient"),
        ([DISTILL, DISTILL], "has an adapter already"),
        ([DISTILL | {"adapter": "full"}, {"step": "merge", "policy": "bundle"}], "needs a model that is adapted"),
        ([DISTILL | {"adapter": {"method": "para", "r": 4}}, {"step": "merge", "policy": "dense"}], "cannot take"),
    ],
)
def test_orders(steps: list[dict[str, Any]], message: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(recipe | {"steps": steps})
    with pytest.raises(ConfigError, match="add data:"):
        parse_recipe({key: recipe[key] for key in ("name", "model")} | {"steps": [DISTILL]})


def foreign_teacher(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    save_model(build_tiny_llama(vocab_size=BYTE_VOCABULARY + 1), folder, tokenizer)
    return folder


def test_another_tokenizer_is_refused_before_anything_is_loaded(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = foreign_teacher(tmp_path / "teacher"), tmp_path / "student"
    save_model(build_tiny_llama(vocab_size=BYTE_VOCABULARY), student, byte_tokenizer())
    steps = [DISTILL | {"teacher": str(teacher)}]
    for source in (str(student), "random"):
        config = {"source": source} | ({} if source != "random" else {"config": small["model"]["config"]})
        path = write_recipe(tmp_path, small | {"model": config, "steps": steps})
        assert main([str(path), "--output", str(tmp_path / f"out-{config['source'][-3:]}")]) == EXIT_USER
        message = capsys.readouterr().err
        assert "the tokenizers differ" in message and "1 of the teacher's 260" in message
        assert "data: teacher_responses" in message and "method: uld" in message
    assert not (tmp_path / "out-ent").exists()
    writes = {"teacher": str(teacher), "data": "teacher_responses", "loss": "hard_labels"}
    assert learns(run(small, tmp_path, DISTILL | writes | {"generation": {"max_new_tokens": 4}}))
    sure = {"teacher": str(teacher), "live": True, "loss": ["hard_labels", {"method": "uld", "weight": 1.5}]}
    assert learns(run(small, tmp_path, DISTILL | sure, out="uld"))


def test_the_dry_run_reckons_with_the_teacher(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.plan import ModelShape
    from pipelines.steps.distill import Distill

    def estimate(**changes: Any) -> Any:
        step = DISTILL | changes
        with torch.device("meta"):
            shape = ModelShape(build_tiny_llama(num_hidden_layers=8), torch.float32, 64)
        shape.recipe = parse_recipe(recipe | {"steps": [step]})
        assert step.get("data") == "text" or Distill.model_validate(step).check(shape, "steps[0]") == []
        return shape, Distill.model_validate(step).estimate(shape)

    shape, cached = estimate(score_batch_size=1, top_k=64)
    _, live = estimate(live=True)
    assert live.memory - cached.memory >= shape.parameters * 4
    tokens = (48 + 12) * 64
    _, larger = estimate(top_k=128)
    assert estimate()[1].disk - cached.disk == tokens * 8 * 192
    assert larger.disk - cached.disk == tokens * 8 * 64 and cached.disk > tokens * 516
    assert "not known yet" in estimate(data="text")[1].note
    assert len(TOPICS) == 3


@pytest.mark.long
def test_scores_are_kept_for_other_runs(small: dict[str, Any], tmp_path: Path) -> None:
    step = DISTILL | {"cache": str(tmp_path / "scores")}
    first = run(small, tmp_path, step, out="a")
    assert first["teacher"]["shards_scored"] == 1
    third = run(small, tmp_path, step | {"loss": "js"}, out="c")
    assert third["teacher"]["shards_scored"] == 0 and third["teacher"]["cache_bytes"] == first["teacher"]["cache_bytes"]
