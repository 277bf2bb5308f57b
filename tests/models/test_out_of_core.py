"""The walk from folder to folder: the bytes of the one in memory, also after a kill; what it needs and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress_peft.errors import ConfigError, MissingRequirement, ModelError
from compress_peft.loading import load
from compress_peft.models import out_of_core
from compress_peft.models.needs import estimate_walk, prefers_out_of_core
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.shards import read_folder
from compress_peft.models.verify import MANIFEST, verify_folder
from compress_peft.quantization import QUANTIZERS, Quantizer, quantize_folder, quantize_model
from tests.conftest import build_tiny_llama
from tests.models.helpers import in_memory, interrupted, method, out_of_core_, raw
from tests.models.test_walk import build, tokens

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        ("llama", "nf4", torch.bfloat16),
        ("llama", "gptq", torch.bfloat16),
        ("llama", "gptaq", torch.float32),  # looks at the unchanged model too
        ("qwen2", "gptq", torch.float32),  # blocks with different masks
        ("opt", "rtn", torch.float32),  # biases, tied embeddings, no rotary buffers
        ("gemma3_text", "gptq", torch.float32),  # two kinds of rotary buffers, tied embeddings
        ("bloom", "gptq", torch.float32),
        ("gpt_neox", "gptq", torch.float32),  # its head has another name in files than in the model
    ],
)
def test_the_bytes_of_the_walk_in_memory(kind: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = save_model(build(kind), tmp_path / "dense", byte_tokenizer())
    twin = in_memory(dense, tmp_path / "twin", name, dtype)
    folder = out_of_core_(dense, tmp_path / "result", name, dtype=dtype)
    assert raw(folder) == raw(twin)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((twin / file).read_text())
    assert set(verify_folder(folder)["files"]) == {p.name for p in folder.iterdir()} - {MANIFEST}
    ids = tokens()
    with torch.no_grad():
        want = load(twin, dtype=dtype)[0](ids).logits
        assert torch.equal(load(folder, dtype=dtype)[0](ids).logits, want)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits, want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "result", "twin"]


def test_the_summary_is_that_of_the_walk_in_memory(source: Path, tmp_path: Path) -> None:
    model, _ = load(source)
    want = quantize_model(model, method("gptq"), tokens(), progress=False)
    found = quantize_folder(source, tmp_path / "a", method("gptq"), tokens(), progress=False)
    assert (found.layers, found.left_alone, found.notes) == (want.layers, want.left_alone, want.notes)
    assert found.seconds.keys() == want.seconds.keys()


def test_activations_on_disk_change_nothing(
    source: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress_peft.models.walk.CHUNK_TOKENS", 24)
    written: list[int] = []
    write = out_of_core.Activations._write

    def counted(self: Any, path: Path, states: Tensor) -> Any:
        written.append(states.numel() * 4)
        return write(self, path, states)

    monkeypatch.setattr(out_of_core.Activations, "_write", counted)
    chunk = 24 * 32 * 4
    folder = out_of_core_(source, tmp_path / "a", activation_bytes=chunk * 1.5)
    assert written == [chunk] * (2 * 3)  # two of three chunks: before the first block, after it and after the second
    plain = out_of_core_(source, tmp_path / "b")
    assert raw(folder) == raw(plain) and raw(folder).keys() == expected.keys()


KILLED = """
import os, signal, sys
from tests.models.helpers import method, out_of_core_
from pathlib import Path

left = int(sys.argv[3])

def on_block(name):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

out_of_core_(Path(sys.argv[1]), Path(sys.argv[2]), on_block=on_block)
"""


@pytest.mark.process
def test_killed_and_resumed(source: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "result"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(target), "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not target.exists()
    work = tmp_path / ".result.partial"
    done = json.loads((work / "progress.json").read_text())["blocks"]
    assert list(done) == ["", "model.layers.0", "model.layers.1"]
    before = {file.name: file.stat().st_mtime_ns for file in (work / "model").iterdir()}
    again: list[str] = []
    with pytest.raises(ConfigError, match="another calibration, settings"):  # rtn has no calibration
        out_of_core_(source, target, "rtn", work=work)
    with pytest.raises(ConfigError, match="another calibration"):
        out_of_core_(source, target, calibration=tokens(5), work=work)
    (work / "model" / ".model-00004-of-00004.safetensors.part").write_bytes(b"half of a block")
    summary = quantize_folder(
        source, target, method("gptq"), tokens(), tokenizer=byte_tokenizer(), progress=False, on_block=again.append
    )
    assert again == ["model.layers.2"]
    assert raw(target) == expected and not work.exists()
    assert all((target / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(summary.layers) == 21 and not any(p.name.startswith(".") for p in target.iterdir())
    load(target)


def test_a_walk_beside_the_unchanged_model_goes_on(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "a", after="model.layers.1", name="gptaq")
    out_of_core_(source, tmp_path / "a", "gptaq")
    assert raw(tmp_path / "a") == raw(out_of_core_(source, tmp_path / "b", "gptaq"))


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_room_is_told_before_the_first_block(
    what: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 1000 if what == "memory" else 10**10
        free = 1000 if what == "disk" else 10**10

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Little)
    blocks: list[str] = []
    with pytest.raises(MissingRequirement, match=rf"{what}: about 0\.00 GB are needed .*0\.00 GB are") as error:
        out_of_core_(source, tmp_path / "a", on_block=blocks.append)
    assert len(error.value.problems) == 1 and not blocks
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_estimate_of_disk_is_what_is_written(source: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build_tiny_llama(hidden_size=64)
    dense = save_model(build_tiny_llama(hidden_size=64), tmp_path / "dense", byte_tokenizer())
    quantizer = QUANTIZERS.create("rtn", group_size=32)
    layers = dict(quantize_layers(model, quantizer))
    needed = estimate_walk(model, layers, quantizer.estimate_bits, 4, (0, 0), (), 0)
    quantize_folder(dense, tmp_path / "a", quantizer, progress=False)
    written = sum(place.bytes for place in read_folder(tmp_path / "a").values())
    assert needed.disk == written
    spilled = estimate_walk(model, layers, quantizer.estimate_bits, 4, (10, 100), ("drift",), 1000)
    assert spilled.disk - written == 2 * 10 * 100 * 64 * 4 - 1000
    hessian = estimate_walk(model, layers, quantizer.estimate_bits, 4, (10, 100), ("hessian",), 1000)
    norms = estimate_walk(model, layers, quantizer.estimate_bits, 4, (10, 100), ("norms",), 1000)
    assert hessian.memory - norms.memory == 4 * (6 * 64**2 + 128**2)


def quantize_layers(model: Any, quantizer: Quantizer) -> list[Any]:
    from compress_peft.quantization.apply import select_layers

    return select_layers(model, quantizer)[0]


def test_auto_looks_at_the_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = build_tiny_llama()
    dense = 4 * sum(p.numel() for p in model.parameters())
    for available, want in ((2 * dense, False), (2 * dense - 2, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: type("M", (), {"available": a}))
        assert prefers_out_of_core(model, 4) is want


def test_models_whose_names_differ_from_their_files_are_refused(tmp_path: Path) -> None:
    dense = save_model(build("mixtral"), tmp_path / "dense", byte_tokenizer())
    with pytest.raises(ModelError, match=r"under another name.*\n.*out_of_core: false"):
        out_of_core_(dense, tmp_path / "a", "nf4")


def test_weights_shared_between_blocks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_config = AutoModelForCausalLM.from_config

    def shared(*args: Any, **kwargs: Any) -> Any:
        model = from_config(*args, **kwargs)
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    dense = save_model(build("llama"), tmp_path / "dense", byte_tokenizer())
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", shared)
    with pytest.raises(ModelError, match=r"layers.2.mlp.up_proj.weight: shares its weights with model.layers.0"):
        out_of_core_(dense, tmp_path / "a", "nf4")


def test_the_source_and_an_existing_target_stay_untouched(source: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    (tmp_path / "a").mkdir()
    with pytest.raises(ModelError, match="not overwritten"):
        out_of_core_(source, tmp_path / "a")
    out_of_core_(source, tmp_path / "b", "rtn")
    assert before == {file.name: file.read_bytes() for file in source.iterdir()}
    assert not list((tmp_path / "a").iterdir())


def test_only_one_block_is_in_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = out_of_core.BlockWalk.__iter__
    seen = []

    def watched(self: Any) -> Any:
        for turn in process(self):
            loaded = {name for name, p in self.model.named_parameters() if p.device.type != "meta"}
            seen.append(turn.name)
            assert loaded == {f"{turn.name}.{name}" for name, _ in turn.block.named_parameters()}
            yield turn
        assert all(p.device.type == "meta" for p in self.model.parameters())

    monkeypatch.setattr(out_of_core.BlockWalk, "__iter__", watched)
    out_of_core_(source, tmp_path / "a")
    assert len(seen) == 3


def test_unfit_layers_are_told_before_the_first_block(source: Path, tmp_path: Path) -> None:
    blocks: list[str] = []
    with pytest.raises(ModelError, match=r"18 more \(21 layers\)|and \d+ more"):
        quantize_folder(source, tmp_path / "a", QUANTIZERS.create("rtn", group_size=40), on_block=blocks.append)
    with pytest.raises(ConfigError, match="needs calibration"):
        quantize_folder(source, tmp_path / "a", method("gptq"), on_block=blocks.append)
    assert not blocks and not (tmp_path / "a").exists()
