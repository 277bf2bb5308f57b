"""The quantize step with a method that needs calibration: where the text comes from, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from compress_peft.data.blocks import CalibrationSettings, calibration_blocks, text_blocks
from compress_peft.data.build import TaskData
from compress_peft.data.datasets import Origin
from compress_peft.data.examples import Example
from compress_peft.errors import ConfigError, DataError, ModelError
from compress_peft.models.needs import LAYER_COPIES
from compress_peft.models.out_of_core import FolderStore
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.shards import read_folder
from compress_peft.models.sources import ResolvedModel
from compress_peft.quantization import QUANTIZERS
from eval.records import RunReport
from pipelines.plan import ModelShape
from pipelines.recipe import EvaluateSettings
from pipelines.report import read_report
from pipelines.run import EXIT_DONE, EXIT_USER, main
from pipelines.state import RunState
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama
from tests.models.test_walk import build
from tests.pipelines.conftest import write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
GPTQ = {"step": "quantize", "method": "gptq", "bits": 4, "group_size": 32, "symmetric": True, "act_order": "static"}
SMALL = {"samples": 6, "length": 32}


def step(**calibration: Any) -> Quantize:
    return Quantize.model_validate(GPTQ | {"calibration": SMALL | calibration})


def state(train: list[str], perplexity: str | None = "test") -> Any:
    """What the step reads of a run; looking at validation or test would fail."""
    data = SimpleNamespace(train=tuple(Example("prompt", " response", text=text) for text in train))
    evaluate = SimpleNamespace(perplexity=perplexity and SimpleNamespace(text=perplexity))
    return SimpleNamespace(
        data=lambda: data, tokenizer=byte_tokenizer, recipe=SimpleNamespace(evaluate=evaluate), device="cpu"
    )


TRAIN = [f"document {i} says {'x' * i} and ends" for i in range(20)]


@pytest.mark.long
def test_the_smoke_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_PEFT_CACHE", str(tmp_path / "cache"))
    recipe = yaml.safe_load((REPOSITORY / "configs/smoke/gptq_para_bundle.yaml").read_text())
    recipe["data"]["source"] = str(REPOSITORY / recipe["data"]["source"])
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    stages = {stage.name: stage for stage in report.stages}
    tuned, exported = stages["fine-tuned (para)"], stages["exported (folder), reloaded"]
    assert exported.perplexity is not None and tuned.perplexity is not None
    assert exported.perplexity.block_nll == tuned.perplexity.block_nll
    assert stages["quantized (gptq)"].storage.bits_per_weight == 4.5
    facts = report.steps[0].details
    calibration = recipe["steps"][0]["calibration"]
    assert facts["calibration"] == {
        "source": "training split",
        "documents": 48,
        "tokens": calibration["samples"] * calibration["length"],
        "sha256": facts["calibration"]["sha256"],
        **calibration,
    }
    assert len(facts["layers"]) == 14 and all(layer["output_error"] > 0 for layer in facts["layers"])


def test_calibration_is_text_of_the_training_split() -> None:
    blocks, facts = step()._calibration(state(TRAIN))
    assert blocks is not None and facts is not None and blocks.shape == (6, 32)
    text = byte_tokenizer().decode(blocks.flatten()).split("</s>")
    assert len(text) > 4 and all(part in TRAIN for part in text[1:-1])
    assert facts["sha256"] == hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    again, same = step()._calibration(state(TRAIN))
    _, different = step(seed=1)._calibration(state(TRAIN))
    assert torch.equal(blocks, again) and same == facts and different != facts


def test_calibration_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} " for i in range(400)))
    blocks, facts = step(text=str(path))._calibration(state([]))
    assert facts is not None and facts["source"] == str(path) and facts["samples"] == 6
    whole = text_blocks(byte_tokenizer(), [path.read_text()], 32).tolist()
    places = [whole.index(block) for block in blocks.tolist()]
    assert places == sorted(set(places)) and places != list(range(6))
    assert step(text=str(path)).requires_data() is None
    with pytest.raises(ConfigError, match="also the text that perplexity is measured on"):
        step(text=str(path))._calibration(state([], perplexity=f"{tmp_path}/../{tmp_path.name}/text.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        step(text=str(tmp_path))._calibration(state([]))


def test_too_little_text() -> None:
    with pytest.raises(DataError, match="6 blocks of 32 tokens are asked for, the text has 2"):
        calibration_blocks(byte_tokenizer(), ["a" * 32, "b" * 40], CalibrationSettings(samples=6, length=32))
    with pytest.raises(DataError, match="calibration: the text has 2 tokens, one block needs 32"):
        calibration_blocks(byte_tokenizer(), ["a"], CalibrationSettings(samples=6, length=32))


def test_a_method_without_statistics_needs_no_data() -> None:
    plain = Quantize.model_validate({"step": "quantize", "method": "nf4"})
    assert plain.requires_data() is None and plain._calibration(state([])) == (None, None)
    reason = step().requires_data()
    assert reason is not None and "gptq" in reason


def test_the_estimate_counts_hessians_and_activations() -> None:
    plain = Quantize.model_validate({"step": "quantize", "method": "rtn", "group_size": 32, "symmetric": True})

    def calibration_bytes(model: nn.Module, **calibration: Any) -> float:
        shapes = [ModelShape(model, torch.float32, 512) for _ in range(2)]
        return step(**calibration).estimate(shapes[0]).memory - plain.estimate(shapes[1]).memory

    with torch.device("meta"):
        model, wide_model = build_tiny_llama(), build_tiny_llama(intermediate_size=1024)
    short, long, wide = (
        calibration_bytes(given, samples=1000, length=length)
        for given, length in ((model, 32), (model, 256), (wide_model, 32))
    )
    assert long - short == 1000 * (256 - 32) * 64 * 4
    hessian = 4 * (1024**2 - 128**2)
    outputs = 3 * 2048 * 4 * (1024 - 128)  # three at once of gate, up, SiLU and their product, in one pass
    without = 4 * LAYER_COPIES * 64 * (1024 - 128)  # which is more than the work on a layer
    assert wide - short == hessian + outputs - without
    problems = step(length=257).check(ModelShape(model, torch.float32, 512), "steps[0]")
    assert [problem.where for problem in problems] == ["steps[0].calibration.length"]
    unfit = Quantize.model_validate(GPTQ | {"group_size": 96})
    found = unfit.check(ModelShape(model, torch.float32, 512), "steps[0]")
    assert len(found) == 3  # 64 inputs, 128 inputs, and 512 > 256 positions
    assert "9 more (12 layers)" in found[1].where and "layers.1.mlp.down_proj" in found[2].where


def run_state(tmp_path: Path, **recipe: Any) -> Any:
    """A run on a dense folder, as the step finds it."""
    backbone = save_model(build_tiny_llama(vocab_size=300), tmp_path / "dense", byte_tokenizer())
    evaluate = EvaluateSettings(**recipe.pop("evaluate", {"perplexity": None}))
    settings = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False, dtype="auto"), evaluate=evaluate)
    settings.device, settings.data = recipe.pop("device", "cpu"), recipe.pop("data", None)
    return RunState(settings, tmp_path, ResolvedModel(backbone, {}))


def weights(folder: Path) -> dict[str, Any]:
    return {name: place.read().tolist() for name, place in read_folder(folder).items()}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text, which is long enough\n" for i in range(40)))
    return str(tmp_path / "text.txt")


def test_out_of_core_gives_the_same_step(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = run_state(tmp_path)
    given = GPTQ | {"calibration": SMALL | {"text": text}}
    results = {}
    for setting in (False, True, "auto"):
        state.forget_model()
        folder = tmp_path / f"steps-{setting}"
        folder.mkdir()
        if setting is not False:
            monkeypatch.setattr(RunState, "model", None)  # the whole model must not be asked for
        if setting == "auto":
            monkeypatch.setattr("pipelines.steps.quantize.prefers_out_of_core", lambda model, each: each == 4)
        results[setting] = Quantize.model_validate(given | {"out_of_core": setting}).run(state, folder)
        assert [path.name for path in folder.iterdir()] == ["model"]
    assert [results[key].facts["out_of_core"] for key in results] == [False, True, True]
    assert len({json.dumps(result.facts["layers"]) for result in results.values()}) == 1
    first, second, third = (weights(tmp_path / str(result.backbone)) for result in results.values())
    assert first == second == third


def test_a_killed_step_goes_on_inside(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["steps"] = [GPTQ | {"calibration": SMALL, "out_of_core": True}]
    recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
    command = [str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]
    step_folder, finish = tmp_path / "out/steps/01-quantize", FolderStore._finish
    finished: list[str] = []

    def stop(self: Any, block: str, *given: Any) -> None:
        finish(self, block, *given)
        finished.append(block)
        if block == "model.layers.0" and len(finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "_finish", stop)
    assert main(command) == EXIT_USER
    assert (step_folder / "checkpoints/walk/progress.json").exists() and not (step_folder / "model").exists()
    assert main([*command, "--resume"]) == EXIT_DONE
    assert finished == ["", "model.layers.0", "model.layers.1"]
    assert sorted(path.name for path in step_folder.iterdir()) == ["model", "result.json"]
    other = [command[0], "--output", str(tmp_path / "other"), "--set", "steps.0.out_of_core=false"]
    assert main(other) == EXIT_DONE
    assert weights(step_folder / "model") == weights(tmp_path / "other/steps/01-quantize/model")


def test_auto_falls_back_where_blocks_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.steps.quantize.prefers_out_of_core", lambda model, each: True)
    state = run_state(tmp_path)
    backbone = save_model(build("mixtral"), tmp_path / "moe", byte_tokenizer())
    state.backbone = backbone
    (tmp_path / "a").mkdir()
    given = {"step": "quantize", "method": "nf4"}
    result = Quantize.model_validate(given).run(state, tmp_path / "a")
    assert result.facts["out_of_core"] is False and "in memory" in result.facts["notes"][0][1]
    assert "warning: quantized in memory" in capsys.readouterr().err
    with pytest.raises(ModelError, match="out_of_core: false"):
        Quantize.model_validate(given | {"out_of_core": True}).run(state, tmp_path / "b")
    state.device = torch.device("cuda")
    with pytest.raises(ConfigError, match="out_of_core: runs on the CPU, and the run's device is cuda"):
        Quantize.model_validate(given | {"out_of_core": True}).run(state, tmp_path / "b")


def test_the_estimate_out_of_core_is_that_of_a_block() -> None:
    with torch.device("meta"):
        model = build_tiny_llama(num_hidden_layers=40)
    estimates = {}
    for setting in (False, True, "auto"):
        given = {"step": "quantize", "method": "nf4", "out_of_core": setting}
        shape = ModelShape(model, torch.float32, 512)
        estimates[setting] = Quantize.model_validate(given).estimate(shape)
    assert estimates[True].memory < estimates[False].memory / 4 and estimates["auto"] == estimates[False]
    assert estimates[True].disk == pytest.approx(estimates[False].disk) and "block by block" in estimates[True].note


def tested(*examples: Example) -> TaskData:
    return TaskData((), (), examples, Origin("examples", ""), 0)


def test_calibration_text_in_the_evaluation_is_told(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("nothing of it is known elsewhere\nLine 7 of the text,  which is long ENOUGH\n")
    part = "3 of the text, which is long enough"  # of a line
    data = tested(Example("", "", text="short"), Example("", "", text="line 3 of the text, which is"))
    perplexity = {"perplexity": {"text": str(held_out)}}
    cases: tuple[Any, ...] = (
        (perplexity, None, f"passages are shared by the calibration text and {held_out}"),
        ({"perplexity": None}, data, None),
        ({"perplexity": None}, tested(Example("", "", text=part)), f'1 passages.*"{part}"'),
        ({"perplexity": None}, tested(Example("", "", text=Path(text).read_text())), "the test split"),
    )
    for index, (evaluate, split, told) in enumerate(cases):
        state = run_state(tmp_path / str(index), evaluate=evaluate, data=split and object())
        state._data = split
        whole = {"samples": 4, "length": 400, "text": text}
        step = Quantize.model_validate(GPTQ | {"calibration": whole})
        blocks, _ = step._calibration(state)
        assert blocks is not None
        notes = step._overlap(state, blocks)
        assert [name for name, _ in notes] == ["calibration"] * bool(told)
        assert told is None or re.search(told, notes[0][1])


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "typo": ({"calibration": {"sampels": 4}}, ["steps[0].calibration.sampels", 'did you mean "samples"?']),
    "no file": ({"calibration": SMALL | {"text": "nowhere.txt"}}, ["steps[0].calibration.text", "nowhere.txt"]),
    "order": ({"act_order": "dynamic"}, ["steps[0].act_order", "static"]),
    "out of core": ({"out_of_core": "sometimes"}, ["steps[0].out_of_core", "auto"]),
    "damping": ({"damping": -1}, ["steps[0].damping", "greater than 0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages(case: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = WRONG[case]
    recipe["steps"][0] = GPTQ | change
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]) == EXIT_USER
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


def test_no_data_section(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del recipe["data"], recipe["steps"][1:]
    recipe["steps"][0] = GPTQ
    recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]) == EXIT_USER
    message = capsys.readouterr().err
    assert "steps[0]: " in message and "calibrates on the training split" in message and "add data:" in message


def test_quantizers_with_statistics_have_calibration_settings() -> None:
    for name in QUANTIZERS:
        cls = QUANTIZERS[name]
        assert bool(cls.needs) == ("calibration" in cls.model_fields)


@pytest.mark.parametrize("out_of_core", [False, True])
def test_the_head_too(recipe: dict[str, Any], tmp_path: Path, out_of_core: bool) -> None:
    recipe["model"]["config"]["tie_word_embeddings"] = True
    recipe["steps"] = [{"step": "quantize", "method": "nf4", "head_bits": 8, "out_of_core": out_of_core}]
    recipe["evaluate"] = {"perplexity": None, "profile": None}
    path, out = write_recipe(tmp_path, recipe), tmp_path / "out"
    assert main([str(path), "--output", str(out)]) == EXIT_DONE
    report = read_report(out)
    dense, quantized = (stage.storage for stage in report.stages)
    assert quantized.embeddings == 0 and quantized.parameters == dense.parameters
    assert quantized.memory_bytes < 0.35 * dense.memory_bytes
    head = report.steps[0].details["head"]
    assert head["tied"] and head["bits"] == 8 and head["relative_error"] < 0.01
    assert sorted(item.name for item in (out / "steps" / "01-quantize").iterdir()) == ["model", "result.json"]
