"""Every registered method on a CUDA device: it runs there, and finds what it finds on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_peft.adapters import ADAPTERS
from compress_peft.loading import load
from compress_peft.models.faster_generate import faster_generate
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.walk import BlockWalk
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.pruning.structured import SHRINKERS, shrink_model
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization.quarot import rotate_model
from compress_peft.training import TrainingSettings, train
from compress_peft.weights import CompressedWeight
from eval.records import RunReport
from pipelines.run import EXIT_DONE, main
from tests import test_serving
from tests.adapters import contract
from tests.adapters.helpers import padded, prompts
from tests.adapters.test_contract import LESS
from tests.conftest import build_tiny_llama
from tests.pipelines.conftest import recipe as recipe
from tests.pipelines.conftest import write_recipe
from tests.pipelines.test_orders import TRAINING, WHOLE, steps

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke"
TEXT = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
LINES = {"dense": tuple(contract.LINES)} | LESS
QUANTIZED: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in QUANTIZERS if method not in ("mixed", "autoround")),
    ("mixed", {"budget": "4 bits"}),
    ("autoround", {"iters": 20}),
    *((method, {"bits": 3, "group_size": 32}) for method in ("rtn", "gptq", "awq", "hqq")),
    ("gptq", {"bits": 4, "group_size": 32, "symmetric": True}),
]
PRUNED: list[tuple[str, dict[str, Any]]] = [
    *((method, settings) for method in PRUNERS for settings in ({"sparsity": 0.5}, {"pattern": "2:4"})),
    ("wanda", {"sparsity": 0.6, "allocation": "owl"}),
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TEXT.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize(
    ("method", "settings"), [pytest.param(*case, id=contract.label(*case)) for case in contract.cases()]
)
def test_adapters(method: str, settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = contract.backbone
    monkeypatch.setattr(contract, "backbone", lambda name: backbone(name).to(DEVICE))
    monkeypatch.setattr(contract, "prompts", lambda *given: prompts(*given).to(DEVICE))
    monkeypatch.setattr(contract, "padded", lambda side: tuple(part.to(DEVICE) for part in padded(side)))
    found, wrong = {}, []
    for line in LINES[kind]:
        try:
            found[line] = contract.outcome(line, method, settings, kind).partition(":")[0]
        except Exception as error:  # all lines are said, not the first alone
            found[line] = "failed"
            wrong.append(f"{line}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
    assert found == {line: contract.expected(line, method, settings, kind) for line in found}


@pytest.mark.parametrize(("method", "settings"), QUANTIZED, ids=str)
def test_quantizers(method: str, settings: dict[str, Any]) -> None:
    summaries, said = [], []
    for device in ("cpu", DEVICE):
        model = build_tiny_llama(hidden_size=128, intermediate_size=256).to(device)
        torch.manual_seed(0)
        summaries.append(quantize_model(model, QUANTIZERS.create(method, **settings), TEXT, progress=False))
        assert all(p.device.type == device for p in model.parameters() if isinstance(p, CompressedWeight))
        said.append(logits(model))
    cpu, cuda = (summary.relative_error for summary in summaries)
    assert cuda == pytest.approx(cpu, rel=0.03)
    dense = logits(build_tiny_llama(hidden_size=128, intermediate_size=256))
    cpu, cuda = (float((found - dense).norm()) for found in said)
    assert cuda == pytest.approx(cpu, rel=0.15)


@pytest.mark.parametrize(("method", "settings"), PRUNED, ids=str)
def test_pruners(method: str, settings: dict[str, Any]) -> None:
    said = []
    for device in ("cpu", DEVICE):
        model = build_tiny_llama().to(device)
        prune_model(model, PRUNERS.create(method, **settings), TEXT, progress=False)
        said.append(logits(model))
        layer = model.model.layers[1].mlp.up_proj.weight
        removed = settings.get("sparsity", 0.5)
        within = 0.1 if "allocation" in settings else 0.02  # OWL gives each block its own share
        assert float((layer == 0).float().mean()) == pytest.approx(removed, abs=within)
    torch.testing.assert_close(said[1], said[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", list(SHRINKERS))
def test_structured_pruners(method: str) -> None:
    said, sizes = [], []
    for device in ("cpu", DEVICE):
        model = build_tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4).to(device)
        shrink_model(model, SHRINKERS.create(method, sparsity=0.25), TEXT)
        said.append(logits(model))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(said[1], said[0], rtol=0.05, atol=0.05)


def test_walk_keeps_everything_on_the_device() -> None:
    model = build_tiny_llama().to(DEVICE)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name}
    for turn in BlockWalk(model, TEXT, layers, progress=False):
        assert {found.hessian.device.type for found in turn.statistics.values()} == {DEVICE}


def test_rotation() -> None:
    model = build_tiny_llama().to(DEVICE)
    before = logits(model)
    rotate_model(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", sorted(SMOKE.glob("*.yaml")), ids=lambda path: path.stem)
def test_smoke_recipes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name files from the root of the project."""
    if path.stem == "gptq_out_of_core":
        pytest.skip("out_of_core is for the CPU")
    monkeypatch.chdir(SMOKE.parents[1])
    monkeypatch.setenv("COMPRESS_PEFT_CACHE", str(tmp_path / "cache"))
    assert main([str(path), "--output", str(tmp_path / "out"), "--set", f"device={DEVICE}"]) == EXIT_DONE


@pytest.mark.parametrize("word", WHOLE)
def test_orders(word: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"device": DEVICE, "steps": steps(word)}
    recipe["data"]["splits"] = {"train": 8, "validation": 4, "test": 4}
    recipe["evaluate"] = {"perplexity": {"blocks": 2, "block_size": 64}, "profile": None}
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]) == EXIT_DONE


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_whole_run(dtype: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Every stage measured; what is exported is what was tuned, and loads."""
    recipe["device"] = DEVICE
    recipe["model"]["dtype"] = dtype
    recipe["evaluate"]["profile"] = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 2}
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    tuned, exported = (
        next(stage for stage in report.stages if stage.name.startswith(name)) for name in ("fine-tuned", "exported")
    )
    assert exported.accuracy.predictions == tuned.accuracy.predictions
    assert exported.perplexity.block_nll == tuned.perplexity.block_nll
    assert exported.latency is not None and exported.memory is not None
    model, tokenizer = load(out / "steps" / "04-export" / "model", DEVICE)
    prompt = tokenizer("number 1 is red\nTopic:", return_tensors="pt").to(DEVICE)
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] <= prompt.input_ids.shape[1] + 5


@pytest.mark.parametrize("length", [64, 192, 100])
def test_padded_rows_leave_the_gradients_finite(length: int, tmp_path: Path) -> None:
    """Of 64 tokens more than a multiple of 128, cuDNN's attention makes NaN of padded rows on Hopper GPUs."""
    model = build_tiny_llama(hidden_size=256, max_position_embeddings=256).to(DEVICE, torch.bfloat16)
    adapter = ADAPTERS.create("lora", r=4)
    model = adapter.attach(model)
    draw = torch.Generator().manual_seed(0)
    rows = [(torch.randint(3, 128, (size - 2,), generator=draw).tolist(), [5, 9]) for size in (length, length // 2)]
    settings = TrainingSettings(max_steps=4, batch_size=2, eval_steps=4, patience=None, warmup=0)
    where: dict[str, Any] = {"max_length": 256, "seed": 0, "checkpoints": tmp_path, "adapter": adapter}
    train(model, byte_tokenizer(), rows, rows, settings, **where)  # which refuses NaN
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_distillation(recipe: dict[str, Any], tmp_path: Path) -> None:
    """With the teacher's logits on disk and with a live teacher: the same first loss."""
    losses = []
    for live in (True, False):
        distill = {"step": "distill", "adapter": {"method": "lora", "r": 2}, "training": TRAINING}
        prune = {"step": "prune", "method": "minitron", "sparsity": 0.2, "calibration": {"samples": 4, "length": 64}}
        recipe |= {"device": DEVICE, "steps": [prune, distill | {"live": live}]}
        recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
        out = tmp_path / f"out-{live}"
        assert main([str(write_recipe(tmp_path, recipe)), "--output", str(out)]) == EXIT_DONE
        losses.append(json.loads((out / "report.json").read_text())["curves"][0]["points"][0]["value"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int4"])
def test_generation_and_tenants(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each row of a mixed batch says what its tenant says alone; beams whose prompt is processed once say the same."""
    folders = test_serving.folders.__wrapped__(tmp_path_factory)
    model = test_serving.backbone(kind).to(DEVICE)
    served = test_serving.Tenants(model)
    names = ["para", "lora", "ia3"]
    for name in names:
        served.add(name, folders / name)
    tokens = prompts(3, 6).to(DEVICE)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        given = {"attention_mask": torch.ones_like(tokens), "num_beams": beams} | options
        mixed = served.generate(input_ids=tokens, adapters=names, **given)
        bare = served.generate(input_ids=tokens, adapters=[None] * 3, **given)
        assert all(not torch.equal(*rows) for rows in zip(mixed, bare, strict=True))
        for row, name in enumerate(names):
            mask = {"attention_mask": torch.ones_like(tokens[:1])}
            alone = served.generate(input_ids=tokens[row : row + 1], adapters=[name], **given | mask)
            assert torch.equal(mixed[row], alone[0]), (name, beams)
    plain, fast = (test_serving.backbone(kind).to(DEVICE) for _ in range(2))
    faster_generate(fast)
    given = {"attention_mask": torch.ones_like(tokens), "num_beams": 3} | options
    assert torch.equal(fast.generate(input_ids=tokens, **given), plain.generate(input_ids=tokens, **given))
