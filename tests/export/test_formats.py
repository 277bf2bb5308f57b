"""Folders of other projects: written, read back byte for byte, and equal to what their documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compress_peft.errors import ConfigError, CorruptFile, ModelError
from compress_peft.export import EXPORTERS, verify_reloaded
from compress_peft.loading import load
from compress_peft.models.foreign import AWQFormat, BitsAndBytesFormat, CompressedTensorsFormat, GPTQFormat
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.verify import MANIFEST
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.tensors.int32 import pack_words, unpack_words
from compress_peft.weights import AffineWeight, NF4Weight, native, products
from tests.conftest import build_tiny_llama


def quantized(method: str = "rtn", **settings):
    model = build_tiny_llama(vocab_size=320, tie_word_embeddings=True)
    quantize_model(model, QUANTIZERS.create(method, **settings), None, progress=False)
    return model


def weight_of(bits: int, symmetric: bool, group: int | None, rows: int = 64, columns: int = 96) -> AffineWeight:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return QUANTIZERS.create("rtn", bits=bits, group_size=group, symmetric=symmetric).quantize(dense)


def bits_of(words: torch.Tensor, bits: int, index: int) -> int:
    """Number `index` of a stream of `bits`-bit numbers, lowest bit first: bit by bit, without any shared code."""
    number = 0
    for bit in range(bits):
        place = index * bits + bit
        number |= ((int(words[place // 32]) >> (place % 32)) & 1) << bit
    return number


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_the_codes_as_one_stream_of_bits(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-45 * bits // 32))
    assert [[bits_of(row, bits, i) for i in range(45)] for row in words] == codes.tolist()
    assert torch.equal(unpack_words(words, bits, 45), codes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_tensors_are_those_of_its_documentation(bits: int, version: int) -> None:
    weight = weight_of(bits, symmetric=False, group=32)
    stored = GPTQFormat(version).write(weight)
    out, columns = weight.shape
    codes = [[bits_of(stored["qweight"][:, o], bits, i) for i in range(columns)] for o in range(4)]
    zeros = [[bits_of(stored["qzeros"][g], bits, o) for g in range(3)] for o in range(out)]
    zeros = torch.tensor(zeros) + (1 if version == 1 else 0)
    grid = stored["scales"].t().float()
    of_input = stored["g_idx"].long()
    dense = (torch.tensor(codes) - zeros[:4, of_input]) * grid[:4, of_input]
    assert torch.equal(dense, weight.dequantize()[:4])


def test_awq_words_hold_every_eight_outputs_in_its_order() -> None:
    weight = weight_of(4, symmetric=False, group=32)
    stored = AWQFormat().write(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes = torch.empty(weight.shape, dtype=torch.long)
    for word in range(8):
        for place in range(8):
            nibbles = (stored["qweight"][:, word].long() >> (4 * place)) & 15
            codes[8 * word + order[place]] = nibbles
    assert torch.equal(codes, weight.unpacked().long())
    assert stored["qzeros"].shape == (3, 8) and stored["scales"].dtype == torch.float16


CASES = [
    *[(GPTQFormat(2), weight_of(b, s, g)) for b in (2, 3, 4, 8) for s in (True, False) for g in (32, None)],
    *[(CompressedTensorsFormat(), weight_of(b, s, g)) for b in (2, 3, 4, 8) for s in (True, False) for g in (32, None)],
    *[(AWQFormat(), weight_of(4, s, g)) for s in (True, False) for g in (32, None)],
    *[(BitsAndBytesFormat(), NF4Weight.quantize(torch.randn(64, 96), double_quant=d)) for d in (True, False)],
]


@pytest.mark.parametrize(("form", "weight"), CASES)
def test_reading_is_the_inverse_of_writing(form, weight) -> None:
    back = form.read(form.write(weight), form.settings({"layer": weight.spec()}, []))
    assert back.spec() == weight.spec()
    for name, tensor in weight.components().items():
        assert torch.equal(tensor, back.components()[name]), name


EXPORTS = [
    ("gptq", {}, {"group_size": 32, "skip": ("*.0.mlp.up_proj",)}),
    ("gptq", {"version": 2}, {"bits": 3, "group_size": None}),
    ("awq", {}, {"group_size": 64}),
    ("compressed-tensors", {}, {"bits": 8, "group_size": 32, "symmetric": True}),
    ("bitsandbytes", {}, {"method": "nf4", "skip": ("*.1.self_attn*",)}),
]


@pytest.mark.parametrize(("form", "settings", "quantizer"), EXPORTS)
def test_a_folder_loads_with_the_same_codes_and_logits(form, settings, quantizer, tmp_path: Path) -> None:
    model = quantized(**quantizer)
    before = {name: type(p) for name, p in model.named_parameters()}
    EXPORTERS.create(form, **settings).export(model, byte_tokenizer(), tmp_path / "model")
    reloaded, _ = load(tmp_path / "model")
    assert verify_reloaded(model, reloaded, 0.0, form)["compressed_weights_equal"] >= 8
    assert {name: type(p) for name, p in reloaded.named_parameters()} == before  # and what was dense is dense
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "compress_peft"  # it did not change itself


def test_verification_sees_one_changed_code(tmp_path: Path) -> None:
    model = quantized(group_size=32)
    EXPORTERS.create("gptq").export(model, byte_tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.qweight"][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match="checksum"):
        load(tmp_path / "model")
    with pytest.raises(CorruptFile, match=r"1 of 14 .*layers.1.mlp.up_proj"):
        verify_reloaded(model, load(tmp_path / "model", verify=False)[0], 1.0, "here")


@pytest.mark.skipif(not native.has_dense(), reason="there are no C kernels here")
def test_a_model_without_kernels_is_not_taken_for_another(tmp_path, monkeypatch):
    """Sums in another order, as a model has that transformers loaded and not `load`, are no damage."""
    monkeypatch.setattr(products, "linear", lambda *given: functional.linear(*given) * (1 + 1e-6))
    model = build_tiny_llama()
    quantize_model(model, QUANTIZERS.create("rtn", group_size=32))
    EXPORTERS.create("compressed-tensors").export(model, byte_tokenizer(), tmp_path / "model")
    assert verify_reloaded(model, load(tmp_path / "model")[0], 0.0, "here")["largest_logit_difference"] == 0


def test_transformers_loads_the_bitsandbytes_folder_as_if_it_had_quantized_itself(tmp_path: Path) -> None:
    model = quantized("nf4")
    EXPORTERS.create("bitsandbytes").export(model, byte_tokenizer(), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if isinstance(weight, NF4Weight):
            other = theirs.get_parameter(name)
            assert torch.equal(
                bitsandbytes.functional.dequantize_4bit(other.data, other.quant_state), weight.dequantize()
            )
    assert torch.isfinite(theirs(torch.arange(8)[None]).logits).all()


def test_transformers_loads_the_compressed_tensors_folder(tmp_path: Path) -> None:
    tokens = torch.arange(40)[None]
    for name, settings in {"symmetric": {"symmetric": True}, "asymmetric": {"group_size": 32}}.items():
        model = quantized(**settings)
        EXPORTERS.create("compressed-tensors").export(model, byte_tokenizer(), tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_gptq_is_version_1_for_symmetric_grids_and_2_for_others(tmp_path: Path) -> None:
    for symmetric, expected in ((True, "gptq"), (False, "gptq_v2")):
        model = quantized(symmetric=symmetric, group_size=32)
        EXPORTERS.create("gptq").export(model, byte_tokenizer(), tmp_path / expected)
        config = json.loads((tmp_path / expected / "config.json").read_text())
        assert config["quantization_config"]["checkpoint_format"] == expected


@pytest.mark.parametrize(
    ("form", "quantizer", "reason"),
    [
        ("gptq", {"method": "nf4"}, "14 layers .*: it holds affine weights, and these are nf4"),
        ("gptq", {"method": "hqq", "group_size": 32}, "integer zeros, and these are float16"),
        ("awq", {"bits": 3, "group_size": 32}, "holds 4 bits, and these have 3"),
        ("bitsandbytes", {"group_size": 32}, "holds nf4 weights"),
        ("gguf", {"method": "nf4"}, "no such grid"),
    ],
)
def test_what_does_not_fit_is_refused_with_all_layers_and_nothing_is_written(form, quantizer, reason, tmp_path) -> None:
    model = quantized(**quantizer)
    with pytest.raises(ModelError, match=reason) as caught:
        EXPORTERS.create(form).export(model, byte_tokenizer(), tmp_path / "model")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].fix
    assert caught.value.problems[0].where.count("layers.") == 14
    assert list(tmp_path.iterdir()) == []
    specs = {name: p.spec() for name, p in model.named_parameters() if hasattr(p, "spec")}
    assert [p.what for p in EXPORTERS.create(form).refusals(specs)] == [p.what for p in caught.value.problems]


def test_gptq_version_1_does_not_take_the_zero_0_and_auto_takes_version_2(tmp_path: Path) -> None:
    model = quantized(group_size=32)
    layer = model.model.layers[0].mlp.up_proj
    positive = layer.weight.dequantize().abs() + 1  # no negative weight: the zero is 0
    layer.weight = torch.nn.Parameter(QUANTIZERS.create("rtn").quantize(positive), requires_grad=False)
    with pytest.raises(ModelError, match="version 1 stores zero - 1"):
        EXPORTERS.create("gptq", version=1).export(model, byte_tokenizer(), tmp_path / "one")
    EXPORTERS.create("gptq").export(model, byte_tokenizer(), tmp_path / "two")
    assert json.loads((tmp_path / "two" / "quantize_config.json").read_text())["checkpoint_format"] == "gptq_v2"
    verify_reloaded(model, load(tmp_path / "two")[0], 0.0, "two")


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    model = quantized(group_size=32, symmetric=True)
    for form in EXPORTERS:
        with pytest.raises(ModelError, match="not overwritten"):
            EXPORTERS.create(form).export(model, byte_tokenizer(), tmp_path)


def test_reading_refuses_reordered_inputs_and_names_missing_tensors(tmp_path: Path) -> None:
    EXPORTERS.create("gptq").export(quantized(group_size=32), byte_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    save_file(tensors | {f"{name}.g_idx": tensors[f"{name}.g_idx"].flip(0)}, file)
    with pytest.raises(ModelError, match=f"{name}.g_idx: its inputs are reordered"):
        load(tmp_path / "model")
    save_file({key: value for key, value in tensors.items() if key != f"{name}.scales"}, file)
    with pytest.raises(CorruptFile, match=f"{name}: .*scales"):
        load(tmp_path / "model")


def test_a_plan_refuses_formats_that_cannot_hold_what_the_quantizer_will_make() -> None:
    from pipelines.plan import ModelShape
    from pipelines.steps.base import STEPS

    with torch.device("meta"):
        model = build_tiny_llama()
    quantize = STEPS.create("quantize", step="quantize", method="nf4")
    shape = ModelShape(model, torch.float32, 64)
    quantize.estimate(shape)
    export = STEPS.create(
        "export", step="export", format="bitsandbytes", also=["gptq", {"format": "gguf", "requantize": True}]
    )
    (problem,) = export.check(shape, "steps[1]")
    assert problem.where == "steps[1].format" and "14 layers" in problem.what and "gptq" in problem.what
    merged = STEPS.create("merge", step="merge", policy="bundle")
    assert len(export.check_against([quantize, merged], "steps[2]")) == 3
    with pytest.raises((ConfigError, ValueError), match="gptq_"):
        STEPS.create("export", step="export", format="folder", also=["gptq_"])
