"""Bottleneck adapters, Compacter and BitFit against the papers' formulas; settings and their errors."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from compress_peft.adapters import (
    ADAPTERS,
    BitFit,
    Compacter,
    CompacterPlusPlus,
    Houlsby,
    KronA,
    KronAB,
    Lora,
    Parallel,
    Pfeiffer,
    PHMAdapter,
)
from compress_peft.adapters.composite import CompositeLayer
from compress_peft.adapters.parts import kronecker_sum
from compress_peft.adapters.targets import sublayers, widths
from compress_peft.errors import ConfigError, ModelError, UserError
from compress_peft.models.bundle import load_adapter, save_adapter
from tests.adapters.helpers import part_at, perturb, prompts
from tests.conftest import build_tiny_llama

D, BLOCKS = 64, 2
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=48)).eval()


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).eval()


def phi3():
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SHAPE, intermediate_size=48, pad_token_id=0)).eval()


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)).eval()


def test_compacter_is_a_sum_of_kronecker_products():
    terms, width, out, rank = 4, 12, 8, 2
    x = torch.randn(3, 5, width, dtype=torch.float64)
    rule = torch.randn(terms, terms, terms, dtype=torch.float64)
    left = torch.randn(terms, width // terms, rank, dtype=torch.float64)
    right = torch.randn(terms, rank, out // terms, dtype=torch.float64)
    matrix = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(terms))  # (in, out)
    torch.testing.assert_close(kronecker_sum(x, rule, left, right), x @ matrix)


def kronecker_matrix(projection):
    """sum_i kron(A_i, B_i), (in, out)."""
    rule, right = projection.rule.weight, projection.right
    factors = right if projection.left is None else projection.left @ right
    return sum(torch.kron(rule[i], factors[i]) for i in range(len(rule)))


@pytest.mark.parametrize("adapter", [Compacter(r=8, phm_dim=4), CompacterPlusPlus(r=8), PHMAdapter(r=8, phm_dim=2)])
def test_kronecker_adapters_by_their_formula(adapter, tmp_path):
    model = adapter.attach(build_tiny_llama())
    start = kronecker_matrix(part_at(model, "model.layers.1.mlp.down_proj").down)
    assert 0.04 < float(start.detach().std()) < 0.12  # of a matrix that is uniform in +-1 / 8: 0.072
    perturb(model, size=0.1)
    shared = not isinstance(adapter, PHMAdapter)
    rules = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if ".rule." in n}
    places = BLOCKS * (1 if isinstance(adapter, CompacterPlusPlus) else 2)
    assert len(rules) == (1 if shared else 2 * places)
    assert len([m for m in model.modules() if isinstance(m, CompositeLayer)]) == places
    part, x = part_at(model, "model.layers.1.mlp.down_proj"), torch.randn(2, 3, D)
    down, up = kronecker_matrix(part.down), kronecker_matrix(part.up)
    expected = torch.nn.functional.gelu(x @ down + part.down.bias) @ up + part.up.bias
    torch.testing.assert_close(part.change(x), expected)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(build_tiny_llama(), tmp_path)
    rules = {id(p) for n, p in again.named_parameters(remove_duplicate=False) if ".rule." in n}
    assert len(rules) == (1 if shared else 2 * places)
    rule = part_at(again, "model.layers.1.mlp.down_proj").up.rule.weight
    assert torch.equal(rule, part.up.rule.weight)


@pytest.mark.parametrize("shape", [None, (16, 2)])
def test_krona_is_a_kronecker_product_on_the_weight(shape):
    adapter = KronA(a_shape=shape, scale=3.0)
    model = adapter.attach(build_tiny_llama())
    perturb(model, size=0.2)
    found = model(prompts()).logits
    plain = build_tiny_llama()
    for block in range(BLOCKS):
        for name in ("q_proj", "v_proj"):
            part = part_at(model, f"model.layers.{block}.self_attn.{name}")
            layer = plain.get_submodule(f"model.layers.{block}.self_attn.{name}")
            layer.weight.data += 3.0 * torch.kron(part.a, part.b)
    torch.testing.assert_close(plain(prompts()).logits, found)
    torch.testing.assert_close(model.merge_and_unload()(prompts()).logits, found)


def test_krona_on_a_transposed_weight():
    model = gpt2()
    adapted = KronA().attach(model)
    perturb(adapted, size=0.2)
    found = adapted(prompts() % 64).logits
    assert not torch.allclose(found, gpt2()(prompts() % 64).logits, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(prompts() % 64).logits, found)


@pytest.mark.parametrize("residual", [False, True])
def test_krona_b_is_beside_the_mlp(residual):
    model = KronAB(scale=2.0, residual=residual).attach(build_tiny_llama())
    perturb(model, size=0.2)
    plain = build_tiny_llama()
    for block in range(BLOCKS):
        part = part_at(model, f"model.layers.{block}.mlp.down_proj")
        matrix = 2.0 * torch.kron(part.a, part.b).T + (part.residual * torch.eye(D) if residual else 0)
        plain.model.layers[block].mlp.register_forward_hook(lambda m, args, y, matrix=matrix: y + args[0] @ matrix)
    torch.testing.assert_close(model(prompts()).logits, plain(prompts()).logits)


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (Houlsby(r=6), BLOCKS * 2 * (2 * D * 6 + 6 + D)),
        (Pfeiffer(r=6), BLOCKS * (2 * D * 6 + 6 + D)),
        (Parallel(r=6), BLOCKS * (2 * D * 6 + 6 + D)),
        (Compacter(r=8, phm_dim=4), 4**3 + BLOCKS * 2 * (2 * (D + 8) + 8 + D)),
        (Compacter(r=8, phm_dim=2, phm_rank=3), 2**3 + BLOCKS * 2 * (2 * 3 * (D + 8) + 8 + D)),
        (CompacterPlusPlus(r=8, phm_dim=4), 4**3 + BLOCKS * (2 * (D + 8) + 8 + D)),
        (PHMAdapter(r=8, phm_dim=4), BLOCKS * 2 * (2 * (4**3 + D * 8 // 4) + 8 + D)),
        (KronA(a_shape=(8, 4)), BLOCKS * (8 * 4 + 8 * 16 + 8 * 4 + 4 * 16)),
        (KronAB(a_shape=(8, 4)), BLOCKS * (8 * 4 + 8 * 16 + 1)),
        (KronAB(residual=False), BLOCKS * 2 * 8 * 8),
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

    def hook(part, reads_input):
        act = torch.nn.functional.gelu if isinstance(adapter, Houlsby) else torch.relu
        scale = getattr(adapter, "scale", 1.0)

        def change(module, args, output):
            source = args[0] if reads_input else output
            hidden = act(source @ part.down.weight + part.down.bias)
            return output + scale * (hidden @ part.up.weight + part.up.bias)

        return change

    for block in range(BLOCKS):
        for place in places:
            name = f"model.layers.{block}.{place}"
            part = part_at(model, f"{name}.down_proj" if reads_input else name)
            plain.get_submodule(name).register_forward_hook(hook(part, reads_input))
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
    assert block.inputs_like("q") == ["gpt_neox.layers.1.attention.query_key_value"]
    block = sublayers(opt())[0]
    assert (block.attention_end.rpartition(".")[2], block.mlp_end.rpartition(".")[2]) == ("out_proj", "fc2")
    assert (block.mlp_start.rpartition(".")[2], widths(opt().get_submodule(block.mlp_start))) == ("fc1", (32, 48))
    block = sublayers(phi3())[0]  # its o_proj is made before its qkv_proj
    assert [name.rpartition(".")[2] for name in block.all] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    block = sublayers(gpt2())[0]
    assert [name.rpartition(".")[2] for name in block.all] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert widths(gpt2().get_submodule(block.mlp_end)) == (128, 32)


@pytest.mark.parametrize("build", ["neox", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("method", ["houlsby", "parallel", "krona_b", "prefix_tuning", "unipelt"])
def test_other_architectures(method, build, tmp_path):
    build = globals()[build]
    plain = build()(prompts() % 64).logits
    model = ADAPTERS.create(method).attach(build())
    perturb(model, size=0.1)
    found = model(prompts() % 64).logits
    assert not torch.allclose(found, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(prompts() % 64).logits, plain)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(load_adapter(build(), tmp_path)(prompts() % 64).logits, found)
    assert torch.equal(model.unload()(prompts() % 64).logits, plain)


def test_parallel_reads_the_input_of_an_mlp_that_is_no_module():
    model, plain = Parallel(r=4).attach(opt()), opt()
    perturb(model, size=0.3)
    for block in range(2):
        part = part_at(model, f"model.decoder.layers.{block}.fc2")
        seen = []
        layer = plain.model.decoder.layers[block]
        layer.fc1.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0]))
        layer.fc2.register_forward_hook(lambda m, args, y, seen=seen, part=part: y + part.change(seen.pop()))
    torch.testing.assert_close(model(prompts() % 64).logits, plain(prompts() % 64).logits)


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
        ("peft", {"type": "cpt"}, "virtual tokens"),
        ("peft", {"type": "prefix_tuning"}, "write method: prefix_tuning"),
        ("krona", {"a_shape": (5, 4)}, "does not divide the weight's shape"),
        ("llama_adapter", {"layers": 3}, "3 of 2 blocks"),
        ("s4", {}, "2 blocks cannot be divided"),
        ("peft", {"type": "adalora"}, "write method: adalora"),
        ("peft", {"type": "shira"}, "peft refuses"),
    ],
)
def test_wrong_settings(method, settings, says):
    with pytest.raises(UserError, match=says):
        ADAPTERS.create(method, **settings).attach(build_tiny_llama())


def test_native_adapters_do_not_merge():
    for adapter in (Houlsby(r=4), KronAB()):
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
