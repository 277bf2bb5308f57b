"""Saving, loading, and finding damage."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from compress_peft.errors import CorruptFile, MissingRequirement, ModelError
from compress_peft.models.save import save_model
from compress_peft.models.verify import MANIFEST, verify_folder
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import CompressedWeight
from tests.conftest import build_tiny_llama

IDS = torch.arange(20)[None]


def quantized(**overrides: object):
    model = build_tiny_llama(**overrides)
    quantize_model(model, QUANTIZERS.create("nf4"), progress=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_round_trip(tmp_path, tied, compress, shard):
    model = quantized(tie_word_embeddings=tied) if compress else build_tiny_llama(tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 77
    with torch.no_grad():
        want = model(IDS).logits
    folder = save_model(model, tmp_path / "sub" / "model", max_shard_size=shard)
    assert verify_folder(folder)["kind"] == "model"
    assert len(list(folder.glob("*.safetensors"))) > 1 if shard == "20KB" else (folder / "model.safetensors").exists()
    assert os.listdir(folder.parent) == ["model"]

    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.generation_config.max_new_tokens == 77
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert isinstance(b, CompressedWeight) == isinstance(a, CompressedWeight), name
        if isinstance(a, CompressedWeight):
            assert not b.requires_grad and a.spec() == b.spec()
            assert all(torch.equal(t, b.components()[key]) for key, t in a.components().items()), name
        else:
            assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, want)


def test_tied_weights_are_stored_once(tmp_path):
    tied = save_model(quantized(tie_word_embeddings=True), tmp_path / "tied")
    free = save_model(quantized(tie_word_embeddings=False), tmp_path / "free")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tied, free)]
    assert sizes[1] - sizes[0] > 0.9 * 128 * 64 * 4


def test_saved_again_after_loading(tmp_path):
    first = save_model(quantized(), tmp_path / "first")
    second = save_model(AutoModelForCausalLM.from_pretrained(first), tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_without_double_quantization_after_scaling(tmp_path):
    model = quantized()
    weight = model.model.layers[0].self_attn.v_proj.weight
    factors = torch.linspace(-1, 2, weight.shape[0])
    model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(weight.scale_rows(factors), requires_grad=False)
    again = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_model_made_dense_again_is_saved_dense(tmp_path):
    model = quantized()
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), CompressedWeight):
            module.weight = torch.nn.Parameter(module.weight.dequantize())
    folder = save_model(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, model(IDS).logits)


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_tokenizer_is_part_of_the_folder(tmp_path):
    folder = save_model(build_tiny_llama(), tmp_path / "model", Tokenizer())
    assert "tokenizer.json" in verify_folder(folder)["files"]


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="not overwritten"):
        save_model(build_tiny_llama(), tmp_path / "model")
    assert os.listdir(tmp_path / "model") == []


def test_adapters_must_be_merged_or_bundled_first(tmp_path):
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for candidate in (model, model.base_model.model):
        with pytest.raises(ModelError, match="bundle"):
            save_model(candidate, tmp_path / "model")


def test_a_failure_leaves_nothing_behind(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_model(build_tiny_llama(), tmp_path / "model", Broken())
    assert os.listdir(tmp_path) == []


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(MissingRequirement, match="GB left"):
        save_model(build_tiny_llama(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(quantized(), tmp_path_factory.mktemp("saved") / "model", max_shard_size="40KB")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_kind_of_damage_is_found_and_all_of_it(folder):
    shards = sorted(folder.glob("*.safetensors"))
    flip(shards[0], -5)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    (folder / "generation_config.json").unlink()
    with pytest.raises(CorruptFile) as error:
        verify_folder(folder)
    assert {problem.where for problem in error.value.problems} == {
        str(shards[0]),
        str(shards[1]),
        str(folder / "generation_config.json"),
    }


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": {}, "format_version": 99}'])
def test_damaged_manifest(folder, content):
    (folder / MANIFEST).unlink()
    if content is not None:
        (folder / MANIFEST).write_text(content)
    with pytest.raises(CorruptFile, match=MANIFEST):
        verify_folder(folder)


def test_one_flipped_bit_in_every_file_is_found(folder):
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        original = copy.copy(path.read_bytes())
        flip(path, len(original) // 2)
        with pytest.raises(CorruptFile, match=path.name):
            verify_folder(folder)
        path.write_bytes(original)
    verify_folder(folder)
