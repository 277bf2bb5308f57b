"""Bottleneck adapters, Compacter and BitFit against the papers' formulas; settings and their errors."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from compress_peft.adapters import ADAPTERS, BitFit, Compacter, Houlsby, Lora, Parallel, Pfeiffer
from compress_peft.adapters.bottleneck_tuner import kronecker_sum
from compress_peft.adapters.targets import sublayers
from compress_peft.errors import ConfigError, ModelError, UserError
from compress_peft.models.bundle import load_adapter, save_adapter
from tests.adapters.helpers import perturb, prompts
from tests.conftest import build_tiny_llama

D, BLOCKS = 64, 2
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=48)).eval()


def opt():
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)).eval()


def test_compacter_is_a_sum_of_kronecker_products():
    terms, width, out, rank = 4, 12, 8, 2
    x = torch.randn(3, 5, width, dtype=torch.float64)
    rule = torch.randn(terms, terms, terms, dtype=torch.float64)
    left = torch.randn(terms, width // terms, rank, dtype=torch.float64)
    right = torch.randn(terms, rank, out // terms, dtype=torch.float64)
    matrix = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(terms))  # (in, out)
    torch.testing.assert_close(kronecker_sum(x, rule, left, right), x @ matrix)


def test_compacter_layers_share_their_rule(tmp_path):
    model = Compacter(r=8, phm_dim=4).attach(build_tiny_llama())
    rules = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if "bottleneck_rule" in n}
    assert len(rules) == 1
    layers = [m for m in model.modules() if hasattr(m, "bottleneck_down") and "default" in m.bottleneck_down]
    assert len(layers) == 2 * BLOCKS
    perturb(model, size=0.1)
    layer, x = layers[0], torch.randn(2, 3, D)
    part = {name: getattr(layer, f"bottleneck_{name}")["default"] for name in ("down", "up", "rule")}
    right = {name: getattr(layer, f"bottleneck_{name}_right")["default"] for name in ("down", "up")}
    bias = {name: getattr(layer, f"bottleneck_{name}_bias")["default"] for name in ("down", "up")}
    down, up = (
        sum(torch.kron(part["rule"][i], part[name][i] @ right[name][i]) for i in range(4)) for name in ("down", "up")
    )
    expected = torch.nn.functional.gelu(x @ down + bias["down"]) @ up + bias["up"]
    torch.testing.assert_close(layer.adapter_output(x, "default"), expected)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(build_tiny_llama(), tmp_path)
    for name, parameter in again.named_parameters(remove_duplicate=False):
        if "bottleneck_rule" in name:
            assert torch.equal(parameter, part["rule"])


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (Houlsby(r=6), BLOCKS * 2 * (2 * D * 6 + 6 + D)),
        (Pfeiffer(r=6), BLOCKS * (2 * D * 6 + 6 + D)),
        (Parallel(r=6), BLOCKS * (2 * D * 6 + 6 + D)),
        (Compacter(r=8, phm_dim=4), 4**3 + BLOCKS * 2 * (2 * (D + 8) + 8 + D)),
        (Compacter(r=8, phm_dim=2, phm_rank=3), 2**3 + BLOCKS * 2 * (2 * 3 * (D + 8) + 8 + D)),
        (BitFit(add_bias=True), BLOCKS * (64 + 32 + 32 + 64 + 128 + 128 + 64)),
    ],
)
def test_parameter_counts_are_those_of_the_docstrings(adapter, count):
    assert adapter.parameter_counts(adapter.attach(build_tiny_llama()))["trainable"] == count
    with torch.device("meta"):
        empty = build_tiny_llama()
    assert adapter.estimate_parameters(empty) == count


@pytest.mark.parametrize(
    ("adapter", "places", "reads_input"),
    [
        (Houlsby(r=6), ["self_attn.o_proj", "mlp.down_proj"], False),
        (Pfeiffer(r=6), ["mlp.down_proj"], False),
        (Parallel(r=6, scale=3.0), ["mlp"], True),
    ],
)
def test_bottlenecks_by_their_formulas(adapter, places, reads_input):
    model, plain = adapter.attach(build_tiny_llama()), build_tiny_llama()
    perturb(model, size=0.3)

    def hook(layer, reads_input):
        weights = [getattr(layer, f"bottleneck_{n}")["default"] for n in ("down", "down_bias", "up", "up_bias")]
        act = torch.nn.functional.gelu if isinstance(adapter, Houlsby) else torch.relu
        scale = getattr(adapter, "scale", 1.0)

        def change(module, args, output):
            down, down_bias, up, up_bias = weights
            source = args[0] if reads_input else output
            return output + scale * (act(source @ down + down_bias) @ up + up_bias)

        return change

    wrapped = [name for name, m in model.get_base_model().named_modules() if "bottleneck" in str(dir(m)).lower()]
    for block in range(BLOCKS):
        for place in places:
            name = f"model.layers.{block}.{place}"
            assert name in wrapped
            layer = model.get_base_model().get_submodule(name)
            plain.get_submodule(name).register_forward_hook(hook(layer, reads_input))
    torch.testing.assert_close(model(prompts()).logits, plain(prompts()).logits)


def test_many_blocks_are_saved_and_loaded(tmp_path):
    """peft shortens long lists of module names; ours must not depend on it."""
    model = Houlsby(r=2).attach(build_tiny_llama(num_hidden_layers=12))
    perturb(model, size=0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(build_tiny_llama(num_hidden_layers=12), tmp_path)
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)


def test_bitfit_is_training_the_biases():
    torch.manual_seed(0)
    model = opt()
    adapted = BitFit().attach(model)
    perturb(adapted, size=0.2)
    changes = {
        name.replace("base_model.model.", "").replace(".bitfit_bias.default", ""): p.detach()
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    # q, k, v, out, fc1, fc2 and two normalizations a block
    assert len(changes) == 2 * 8
    assert sum(p.numel() for p in changes.values()) == 2 * (4 * 32 + 48 + 32 + 2 * 32)
    tokens = prompts() % 64
    found = adapted(tokens).logits
    plain = adapted.unload()
    for name, change in changes.items():
        plain.get_submodule(name).bias.data += change
    torch.testing.assert_close(plain(tokens).logits, found)
    with pytest.raises(ModelError, match="add_bias: true"):
        BitFit().attach(build_tiny_llama())


def test_sublayers_are_found_by_structure():
    block = sublayers(neox())[1]
    assert (block.attention_end, block.mlp_end) == (
        "gpt_neox.layers.1.attention.dense",
        "gpt_neox.layers.1.mlp.dense_4h_to_h",
    )
    block = sublayers(opt())[0]
    assert (block.attention_end.rpartition(".")[2], block.mlp_end.rpartition(".")[2]) == ("out_proj", "fc2")
    with pytest.raises(ModelError, match="no module of its own"):
        Parallel().attach(opt())
    with pytest.raises(ModelError):
        Houlsby().attach(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)))
    for model in (neox(), opt()):
        adapted = Houlsby(r=4).attach(model)
        before = adapted(prompts() % 64).logits
        perturb(adapted, size=0.1)
        assert not torch.allclose(adapted(prompts() % 64).logits, before, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("compacter", {"r": 6}, "4 does not divide r 6"),
        ("houlsby", {"activation": "gelo"}, 'did you mean "gelu"'),
        ("oft", {"oft_block_size": 24}, "24 does not divide the inputs of 14 layers"),
        ("peft", {"type": "mis"}, 'did you mean "miss"'),
        ("peft", {"type": "miss", "settings": {"mini_rr": 1}}, 'did you mean "mini_r"'),
        ("peft", {"type": "miss", "settings": {"target_modules": ["q_prj"]}}, 'did you mean "q_proj"'),
        ("peft", {"type": "lora"}, "write method: lora"),
        ("peft", {"type": "prefix_tuning"}, "virtual tokens"),
        ("peft", {"type": "adalora"}, "after each optimizer step"),
        ("peft", {"type": "shira"}, "peft refuses"),
    ],
)
def test_wrong_settings(method, settings, says):
    with pytest.raises(UserError, match=says):
        ADAPTERS.create(method, **settings).attach(build_tiny_llama())


def test_native_adapters_do_not_merge():
    for adapter in (Houlsby(r=4), BitFit(add_bias=True)):
        model = adapter.attach(build_tiny_llama())
        perturb(model, size=0.1)
        found = model(prompts()).logits
        with pytest.raises(ConfigError, match="no weight that is equal"):
            model.merge_and_unload()
        assert torch.equal(model(prompts()).logits, found)


def test_other_spellings():
    adapter = Lora(**{"rank": 3, "alpha": 5})
    assert (adapter.r, adapter.lora_alpha) == (3, 5)
    assert {"r": 3, "lora_alpha": 5.0}.items() <= adapter.model_dump().items()
    assert Lora(r=3) == Lora(**{"rank": 3})
    properties = Lora.model_json_schema()["properties"]
    assert properties["rank"] == properties["r"] and "alpha" in properties
    with pytest.raises(ValueError, match="rank"):
        Lora(**{"r": 3, "rank": 4})
    with pytest.raises(ValueError, match="rnk"):
        Lora(**{"rnk": 4})
