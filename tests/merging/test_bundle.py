"""Backbone and adapter in one folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import CorruptFile, ModelError
from compress_peft.merging import Bundle, load_bundle
from compress_peft.models import bundle as bundle_module
from compress_peft.models.bundle import is_bundle, load_adapter, save_bundle, save_folder
from compress_peft.models.verify import verify_folder
from compress_peft.quantization.apply import quantize_model
from compress_peft.quantization.nf4 import NF4
from tests.adapters.helpers import padded, perturb, prompts
from tests.conftest import build_tiny_llama


def build(method, compressed):
    model = build_tiny_llama()
    if compressed:
        quantize_model(model, NF4(), progress=False)
    model = ADAPTERS.create(method).attach(model)
    perturb(model, size=0.3)
    return model.eval()


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".default" in name}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("method", ["para", "lora", "ia3"])
def test_saved_and_loaded_by_one_call(tmp_path, method, compressed):
    model = build(method, compressed)
    tokens, mask = padded("left")
    before = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    expected = model(tokens, attention_mask=mask).logits
    merged = Bundle().merge(model)
    assert merged is model
    save_folder(merged, tmp_path / "deep" / "bundle")
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    assert torch.equal(model(tokens, attention_mask=mask).logits, expected)
    assert set(model.get_base_model().peft_config) == {"default"}

    folder = tmp_path / "deep" / "bundle"
    assert is_bundle(folder) and verify_folder(folder)["kind"] == "bundle"
    assert "adapter/adapter_model.safetensors" in verify_folder(folder)["files"]
    again = load_bundle(folder)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert list(trained(again)) == list(trained(model)) and trained(again)
    for name, parameter in trained(model).items():
        assert torch.equal(trained(again)[name], parameter)
    assert torch.equal(again(tokens, attention_mask=mask).logits, expected)
    settings = dict(max_new_tokens=12, do_sample=False)
    said = again.generate(input_ids=tokens, attention_mask=mask, **settings)
    assert torch.equal(said, model.generate(input_ids=tokens, attention_mask=mask, **settings))
    codes = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert codes.dtype == (torch.uint8 if compressed else torch.float32)


def test_an_adapter_of_another_name(tmp_path):
    model = ADAPTERS.create("para").attach(build_tiny_llama(), "mine")
    perturb(model)
    save_bundle(model, tmp_path / "bundle")
    files = sorted(path.name for path in (tmp_path / "bundle" / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    torch.testing.assert_close(load_bundle(tmp_path / "bundle")(prompts()).logits, model(prompts()).logits)


def test_no_path_of_this_machine_is_saved(tmp_path):
    model = build("para", False)
    model.peft_config["default"].base_model_name_or_path = "/home/someone/model"
    save_bundle(model, tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    model = build("para", False)
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists"):
        save_bundle(model, tmp_path / "there")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(bundle_module, "save_adapter", fail)
    expected = model(prompts()).logits
    with pytest.raises(OSError, match="disk full"):
        save_bundle(model, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
    assert torch.equal(model(prompts()).logits, expected)


def test_a_failed_save_puts_the_adapter_back(tmp_path, monkeypatch):
    model = build("para", False)
    expected = model(prompts()).logits

    def fail(backbone, *args):
        assert not hasattr(backbone, "peft_config") and type(backbone.model.layers[0]).__name__ == "LlamaDecoderLayer"
        raise OSError("disk full")

    monkeypatch.setattr(bundle_module, "save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(model, tmp_path / "bundle")
    assert torch.equal(model(prompts()).logits, expected)


def test_one_adapter_only(tmp_path):
    model = build("para", False)
    ADAPTERS.create("para").attach(model, "second")
    with pytest.raises(ModelError, match="the model has 2: default, second"):
        save_bundle(model, tmp_path / "bundle")


def test_damage_is_found(tmp_path):
    save_bundle(build("para", False), tmp_path / "bundle")
    weights = tmp_path / "bundle" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CorruptFile, match=r"adapter_model.safetensors"):
        verify_folder(tmp_path / "bundle")


def test_other_folders_are_no_bundles(tmp_path):
    save_folder(build_tiny_llama(), tmp_path / "model")
    assert not is_bundle(tmp_path / "model") and not is_bundle(tmp_path)
    with pytest.raises(ModelError, match="is not a bundle"):
        load_bundle(tmp_path / "model")
    (tmp_path / "compress_peft.json").write_text("{")
    assert not is_bundle(tmp_path)


def test_the_adapter_alone_attaches_to_a_loaded_backbone(tmp_path):
    model = build("para", False)
    save_bundle(model, tmp_path / "bundle")
    again = load_adapter(build_tiny_llama(), tmp_path / "bundle").eval()
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)
