"""Mixed batches: each row says what its tenant says alone."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import ConfigError, CorruptFile, DataError, MissingRequirement, ModelError
from compress_peft.models.faster_generate import faster_generate
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.serving import Tenants
from tests.adapters.helpers import perturb
from tests.conftest import build_tiny_llama

KINDS = {
    "para": ("para", {}, 0.4),
    "para2": ("para", {"r": 3, "activation": "silu", "layers": (1,)}, 0.4),
    "ia3": ("ia3", {}, 0.7),
    "ia3out": ("ia3", {"target_modules": ("v_proj", "q_proj"), "feedforward_modules": ()}, 0.7),
    "lora": ("lora", {"r": 4}, 0.2),
    "lora2": ("lora", {"r": 2, "use_rslora": True, "target_modules": ("q_proj", "up_proj")}, 0.4),
}
ROWS = ["para", None, "lora", "ia3", "para2", "lora2", "ia3out", "para"]
BACKBONES = {"dense": None, "nf4": ("nf4", {"block_size": 64}), "int4": ("rtn", {"bits": 4, "group_size": 16})}
WAYS = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 3}, "no cache": {"num_beams": 1, "use_cache": False}}
NEW = 8


def backbone(kind="dense", **settings):
    model = build_tiny_llama(**settings)
    if BACKBONES[kind]:
        method, options = BACKBONES[kind]
        quantize_model(model, QUANTIZERS.create(method, **options), progress=False)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tenants")
    for seed, (name, (method, settings, size)) in enumerate(KINDS.items()):
        adapted = ADAPTERS.create(method, **settings).attach(build_tiny_llama())
        perturb(adapted, seed, size)
        adapted.save_pretrained(root / name)
    return root


def served(model, folders):
    tenants = Tenants(model)
    for name in KINDS:
        tenants.add(name, folders / name)
    return tenants


def batch():
    """Eight prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 128, (8, 10), generator=generator)
    mask = (torch.arange(10) >= torch.tensor([0, 3, 5, 1, 4, 2, 6, 0])[:, None]).long()
    return tokens * mask, mask


def say(model, tokens, mask, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(input_ids=tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]


@pytest.mark.parametrize(
    ("kind", "way"),
    [("dense", "greedy"), ("dense", "beam"), ("dense", "no cache"), ("nf4", "greedy"), ("int4", "beam")],
)
def test_each_row_says_what_its_tenant_says_alone(folders, kind, way):
    """Alone: the row without padding, through Hugging Face peft."""
    tokens, mask = batch()
    together = say(served(backbone(kind), folders), tokens, mask, adapters=ROWS, **WAYS[way])
    plain = say(backbone(kind), tokens, mask, **WAYS[way])
    for row, name in enumerate(ROWS):
        model = backbone(kind)
        if name is not None:
            model = PeftModel.from_pretrained(model, folders / name).eval()
        real = mask[row].bool()
        alone = say(model, tokens[row, real][None], mask[row, real][None], **WAYS[way])[0]
        assert torch.equal(together[row], alone), name
        assert torch.equal(together[row], plain[row]) == (name is None), name


def test_beams_that_share_their_prompts(folders):
    tokens, mask = batch()
    want = say(served(backbone(), folders), tokens, mask, adapters=ROWS, num_beams=3)
    sharing = backbone()
    faster_generate(sharing)
    rows = []
    sharing.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert torch.equal(say(served(sharing, folders), tokens, mask, adapters=ROWS, num_beams=3), want)
    assert rows == [8] + [24] * (NEW - 1)


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_peft(folders, name):
    tokens, mask = batch()
    model = backbone()
    with torch.no_grad():
        tenants = served(model, folders)
        with tenants.request([name] * 8, mask):
            ours = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1).logits
        bare = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1).logits
        adapted = PeftModel.from_pretrained(backbone(), folders / name).eval()
        theirs = adapted(input_ids=tokens, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert (ours - bare).abs().max() > 0.01


def test_nothing_is_left_of_a_request(folders):
    tokens, mask = batch()
    model = backbone()
    tenants = served(model, folders)
    before = say(model, tokens, mask)
    first = say(tenants, tokens, mask, adapters=ROWS)
    other = say(tenants, tokens.flip(0), mask.flip(0), adapters=ROWS[::-1])
    assert torch.equal(other, first.flip(0))
    with pytest.raises(RuntimeError), tenants.request(ROWS, mask):
        raise RuntimeError
    assert torch.equal(say(tenants, tokens, mask, adapters=ROWS), first)
    assert torch.equal(say(model, tokens, mask), before)
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


def test_gradients_reach_the_inputs_of_their_own_row_only(folders):
    tokens, mask = batch()
    model = backbone("int4")
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with served(model, folders).request(ROWS, mask):
        model(inputs_embeds=inputs, attention_mask=mask).logits[2, -1].sum().backward()
    assert inputs.grad[2].abs().sum() > 0
    assert inputs.grad[[0, 1, 3, 4, 5, 6, 7]].abs().sum() == 0


def test_mistakes_in_a_request_name_all_offenders(folders):
    tokens, mask = batch()
    tenants = served(backbone(), folders)
    with pytest.raises(ConfigError, match="2 problems") as error:
        tenants.generate(tokens, ["parra", "nobody", *ROWS[2:]], mask)
    assert 'did you mean "para"' in str(error.value)
    with pytest.raises(DataError, match="7 names for 8 rows"):
        tenants.generate(tokens, ROWS[1:], mask)
    with pytest.raises(DataError, match="repeat whole rows"), tenants.request(ROWS, mask):
        tenants.backbone(tokens[:3])
    with pytest.raises(DataError, match="whole prompts"), tenants.request(ROWS, mask):
        tenants.backbone(tokens[:, :4])


def test_adapters_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)layers\.0.*layers\.1.*does not fit this backbone"):
        Tenants(backbone(hidden_size=32, num_attention_heads=4)).add("a", folders / "lora")
    for name in ("para", "ia3", "lora"):
        with pytest.raises(ModelError, match="no such module"):
            Tenants(backbone(num_hidden_layers=1)).add("a", folders / name)
    with pytest.raises(ModelError, match="carries an adapter"):
        Tenants(PeftModel.from_pretrained(backbone(), folders / "ia3"))
    with pytest.raises(MissingRequirement, match=r"adapter_config.json and no adapter_model"):
        Tenants(backbone()).add("a", tmp_path)
    tenants = Tenants(backbone())
    tenants.add("a", folders / "ia3")
    with pytest.raises(ConfigError, match="of this name"):
        tenants.add("a", folders / "para")
    tenants.remove("a")
    assert tenants.names == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"use_dora": True, "bias": "all"}, "2 problems"),
        ({"peft_type": "LOKR"}, "LOKR cannot be mixed"),
    ],
)
def test_what_cannot_be_mixed_is_refused(folders, tmp_path, change, found):
    for path in (folders / "lora").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ConfigError, match=found):
        Tenants(backbone()).add("a", tmp_path)
    config.write_text("{")
    with pytest.raises(CorruptFile):
        Tenants(backbone()).add("a", tmp_path)
