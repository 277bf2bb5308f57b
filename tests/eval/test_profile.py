from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress_peft.errors import ModelError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.quantization import QUANTIZERS, quantize_model
from eval.costs import Latency
from eval.latency import OtherLoad, decode, time_model
from eval.profile import ProfileSettings, main, profile_folder
from tests.conftest import build_tiny_llama

SETTINGS = ProfileSettings(prompt_tokens=16, new_tokens=8, batch=2, repeats=2, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "model"
    model = build_tiny_llama(vocab_size=20_000, hidden_size=512, tie_word_embeddings=True)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.process
def test_a_fresh_process_measures_memory_and_speed(folder: Path) -> None:
    memory, latency = profile_folder(folder, SETTINGS)
    weights = (folder / "model.safetensors").stat().st_size
    assert memory.load_peak_bytes > memory.baseline_bytes + 0.9 * weights
    assert memory.run_peak_bytes > memory.baseline_bytes
    # keys and values: 2 * layers 2 * rows 2 * kv heads 2 * tokens (16 + 7) * head size 128 * 4 bytes
    assert memory.kv_cache_bytes == 2 * 2 * 2 * 2 * 23 * 128 * 4
    assert len(latency.prefill_seconds.values) == 2 and latency.prefill_seconds.min > 0
    assert latency.decode_tokens_per_second.min > 0
    assert (latency.batch, latency.prompt_tokens, latency.new_tokens, latency.threads) == (2, 16, 8, 1)
    assert (latency.device, latency.dtype) == ("cpu", "float32")


@pytest.mark.process
def test_the_childs_problems_are_passed_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="256 positions"):
        profile_folder(folder, ProfileSettings(prompt_tokens=300, threads=1))


def test_wrong_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(folder), "--new-tokens", "1"])
    assert stopped.value.code == 2
    assert "new_tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(folder), "--batches", "0"])
    assert stopped.value.code == 2 and "batches" in capsys.readouterr().err


@pytest.mark.process
def test_further_batches_prompts_and_beams(folder: Path) -> None:
    wanted = ProfileSettings(prompt_tokens=16, new_tokens=4, repeats=2, threads=1, batches=(1, 3), beams=(1, 2))
    _, latency = profile_folder(folder, wanted)
    assert [(point.batch, point.prompt_tokens, point.beams) for point in latency.grid] == [
        (1, 16, 1), (1, 16, 2), (3, 16, 1), (3, 16, 2),
    ]  # fmt: skip
    assert all(len(point.decode_tokens_per_second.values) == 2 for point in latency.grid)
    assert latency.batch == 1 and latency.read_bandwidth > 0
    with pytest.raises(ModelError, match="256 positions"):
        profile_folder(folder, ProfileSettings(prompts=(8, 300), threads=1))


def timed(model: nn.Module, **settings: int) -> Latency:
    small = ProfileSettings(**({"prompt_tokens": 16, "new_tokens": 8, "repeats": 1} | settings))
    return time_model(model.eval(), small, lambda: 0)[0]


def test_a_step_reads_every_weight_once_and_half_of_the_generated_keys() -> None:
    tied, untied = build_tiny_llama(tie_word_embeddings=True), build_tiny_llama(tie_word_embeddings=False)
    cache = decode(tied, torch.zeros(2, 16, dtype=torch.long), 8).cache_bytes * 20 / 23  # 16 + 8 / 2 of 16 + 7 tokens
    weights = 4 * sum(parameter.numel() for parameter in tied.parameters()) + 4 * sum(
        buffer.numel() for buffer in tied.buffers()
    )
    read = timed(tied, batch=2).bytes_per_step
    assert read == int(weights + cache)
    assert timed(untied, batch=2).bytes_per_step == read  # of its table a few rows, of its head everything
    quantize_model(untied, QUANTIZERS.create("nf4"), progress=False)
    linears = [module for module in untied.modules() if isinstance(module, nn.Linear)]
    smaller = sum(
        4 * linear.weight.numel() - getattr(linear.weight, "storage_bytes", 4 * linear.weight.numel())
        for linear in linears
    )
    assert smaller > 0 and timed(untied, batch=2).bytes_per_step == read - smaller


def test_the_share_of_the_bandwidth() -> None:
    model = build_tiny_llama()
    found = timed(model, batch=2)
    rate = found.decode_tokens_per_second.median
    assert found.token_seconds == 2 / rate
    assert found.bandwidth_share == pytest.approx(found.bytes_per_step * rate / 2 / found.read_bandwidth)


def test_own_work_is_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    starts = [(100.0, 40.0, 0.0)] * 3
    ends = [(112.0, 48.0, 10.0), (101.0, 48.0, 10.0), (100.3, 40.1, 0.2)]
    readings = iter([reading for pair in zip(starts, ends, strict=True) for reading in pair])
    monkeypatch.setattr(OtherLoad, "_read", lambda self: next(readings))
    assert OtherLoad().share() == pytest.approx((12 - 8) / 20)
    assert OtherLoad().share() == 0  # the counters' grain
    assert OtherLoad().share() is None
