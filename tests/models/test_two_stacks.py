"""The walk over an encoder-decoder against the model's own passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from compress_peft.errors import DataError, ModelError
from compress_peft.models.layers import decoder_layers, linear_layers
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.pruning.structured import SHRINKERS, shrink_model
from compress_peft.quantization import QUANTIZERS, quantize_folder, quantize_model
from compress_peft.quantization.groupings import find_groupings

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "gated t5": ("t5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", BART),
}
CALIBRATION = torch.randint(3, 128, (4, 17), generator=torch.Generator().manual_seed(0))
START = 7
GIVEN = {
    "input_ids": CALIBRATION[:, :8],
    "decoder_input_ids": torch.cat([torch.full((4, 1), START), CALIBRATION[:, 8:-1]], dim=1),
}


def build(kind: str) -> nn.Module:
    model_type, settings = KINDS[kind]
    torch.manual_seed(0)
    special = {"vocab_size": 320, "decoder_start_token_id": START, "pad_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **settings | special)).eval()
    for parameter in model.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.data = 0.5 * parameter + noise
    return model


@torch.no_grad()
def own_pass(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """What goes into each block, and comes out of the last, when the model itself runs; its logits."""
    seen: dict[str, Tensor] = {}
    blocks = decoder_layers(model)

    def before(name: str) -> Any:
        return lambda module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["end"] = output if isinstance(output, Tensor) else output[0]

    handles = [block.register_forward_pre_hook(before(name), with_kwargs=True) for name, block in blocks]
    handles.append(blocks[-1][1].register_forward_hook(after))
    logits = model(**GIVEN).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_see_what_they_see_in_the_model(kind: str) -> None:
    """Also after every block was changed: the decoder then has what the changed encoder puts out."""
    model = build(kind)
    found: dict[str, Tensor] = {}

    def change(turn: BlockTurn) -> None:
        found[turn.name] = torch.cat(list(turn.inputs))
        with torch.no_grad():
            for layer in turn.layers.values():
                layer.weight.mul_(1.1)
            found["end"] = torch.cat([turn.run(chunk) for chunk in turn.inputs])

    for turn in BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False, ("norms",)):
        change(turn)
    seen, _ = own_pass(model)
    assert found.keys() == seen.keys()
    for name, states in seen.items():
        own = found[name][:, : states.shape[1]]
        torch.testing.assert_close(own, states, rtol=1e-5, atol=1e-5)
        assert found[name].shape[1] == (8 if "encoder.b" in name or "encoder.l" in name else 17), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_model_is_the_target(kind: str) -> None:
    """What a block should put out comes from the unchanged encoder and decoder; only its own tokens can differ."""
    want, _ = own_pass(build(kind))
    model = build(kind)
    names = [name for name, _ in decoder_layers(model)]
    for turn in BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False, ("inputs", "targets")):
        after = {a: b for a, b in zip(names, [*names[1:], "end"], strict=True)}[turn.name]
        targets, inputs = torch.cat(list(turn.targets)), torch.cat(list(turn.inputs))
        if "decoder" in turn.name:
            torch.testing.assert_close(targets[:, :9], want[after], rtol=1e-5, atol=1e-5)
            assert torch.equal(targets[:, 9:], inputs[:, 9:])
            assert torch.equal(turn.targets[:1][0], turn.targets[0])
        elif "decoder" not in after:
            torch.testing.assert_close(targets, want[after], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for layer in turn.layers.values():
                layer.weight.mul_(1.1)


def test_groupings_of_t5() -> None:
    """Norms to what they feed, values to outputs, in cross-attention too; its keys and values read the encoder."""
    model = build("gated t5").double()
    _, before = own_pass(model)
    found: list[tuple[str, tuple[str, ...]]] = []
    left: list[str] = []
    generator = torch.Generator().manual_seed(1)
    for turn in BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False):
        groupings, reasons = find_groupings(turn, ())
        inside = len(turn.name) + 1
        if turn.name == "decoder.block.1":
            found = [(g.source[inside:], tuple(name[inside:] for name in g.targets)) for g in groupings]
        left += reasons
        for grouping in groupings:
            grouping.apply(torch.rand(int(grouping.index.max()) + 1, generator=generator) * 3 + 0.3)
    assert found == [
        ("layer.0.layer_norm", tuple(f"layer.0.SelfAttention.{name}" for name in "qkv")),
        ("layer.0.SelfAttention.v", ("layer.0.SelfAttention.o",)),
        ("layer.1.layer_norm", ("layer.1.EncDecAttention.q",)),
        ("layer.1.EncDecAttention.v", ("layer.1.EncDecAttention.o",)),
        ("layer.2.layer_norm", ("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1")),
        ("layer.2.DenseReluDense.wi_1", ("layer.2.DenseReluDense.wo",)),
    ]
    assert left == [f"decoder.block.{block}.layer.1.EncDecAttention.{name}" for block in (0, 1) for name in "kv"]
    assert (own_pass(model)[1] - before).abs().max() <= 1e-7 * before.abs().max()  # its norms are float32 inside


@pytest.mark.parametrize("method", ["gptq", "gptaq", "awq", "autoround"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_calibration_helps(kind: str, method: str) -> None:
    _, want = own_pass(build(kind))
    errors = {}
    for name, more in (("rtn", {}), (method, {"iters": 30} if method == "autoround" else {})):
        model = build(kind)
        quantize_model(model, QUANTIZERS.create(name, bits=3, group_size=32, **more), CALIBRATION, progress=False)
        errors[name] = float((own_pass(model)[1] - want).norm())
    assert errors[method] < 0.95 * errors["rtn"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning(method: str) -> None:
    _, want = own_pass(build("t5"))
    errors = {}
    for name in ("magnitude", method):
        model = build("t5")
        prune_model(model, PRUNERS.create(name, sparsity=0.5), CALIBRATION, progress=False)
        errors[name] = float((own_pass(model)[1] - want).norm())
    assert errors[method] < errors["magnitude"]


def test_a_second_walk_starts_anew() -> None:
    walk = BlockWalk(build("t5"), CALIBRATION, {}, False, ("inputs",))
    first, second = ([torch.cat(list(turn.inputs)) for turn in walk] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_what_is_refused(tmp_path: Path) -> None:
    model, quantizer = build("t5"), QUANTIZERS.create("gptq", group_size=32)
    with pytest.raises(DataError, match="too short for two stacks"):
        quantize_model(model, quantizer, CALIBRATION[:, :1], progress=False)
    with pytest.raises(ModelError, match="encoder-decoder"):
        shrink_model(model, SHRINKERS.create("shortgpt", sparsity=0.5), CALIBRATION)
    save_model(model, tmp_path / "dense", byte_tokenizer())
    with pytest.raises(ModelError, match="leave out_of_core out"):
        quantize_folder(tmp_path / "dense", tmp_path / "out", quantizer, CALIBRATION, progress=False)
