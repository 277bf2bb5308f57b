"""What every adapter must do, one function a line; `python -m benchmarks.adapters` prints the matrix.

A line passes, or raises a UserError: a refusal with its reason. Anything else is a failure, and so is what `expected`
does not expect.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from compress_peft.adapters import ADAPTERS, Adapter
from compress_peft.adapters.targets import sublayers
from compress_peft.errors import UserError
from compress_peft.merging import MERGERS
from compress_peft.models.bundle import bare_backbone, load_adapter, save_adapter
from compress_peft.models.layers import is_encoder_decoder, linear_layers
from compress_peft.models.prompts import prompt_kwargs
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from eval.storage import measure_storage
from tests.adapters.architectures import ARCHITECTURES, build_tiny
from tests.adapters.helpers import padded, perturb, prompts
from tests.conftest import build_tiny_llama

GENERIC: list[dict[str, Any]] = [
    *({"type": name} for name in ("beft", "miss", "pvera", "hira")),
    {"type": "road", "settings": {"group_size": 16}},
    {"type": "waveft", "settings": {"n_frequency": 50}},
]


def source_prompts(length: int) -> list[str]:
    """Folders of two prompts (length, 64), saved as trained ones are; they live as long as the process."""
    folders = []
    for seed in range(2):
        folders.append(tempfile.mkdtemp(prefix="prompt"))
        atexit.register(shutil.rmtree, folders[-1])
        prompt = torch.randn(length, 64, generator=torch.Generator().manual_seed(seed))
        save_file({"prompt_states.embedding": prompt}, f"{folders[-1]}/adapter_model.safetensors")
    return folders


SMALL: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"use_dora": True}, {"init": "orthogonal"}, {"init": "pissa"}, {"init": "olora"}],
    "fourierft": [{"n_frequency": 50}],
    "bitfit": [{"add_bias": True}],
    "houlsby": [{"r": 8}],
    "pfeiffer": [{"r": 8}],
    "parallel": [{"r": 8}],
    "phm": [{"r": 8}],
    "compacter": [{"r": 8}],
    "compacter++": [{"r": 8}],
    "qa_lora": [{"group_size": 32}],
    "l4q": [{"group_size": 32}],
    "krona": [{}, {"a_shape": (4, 2), "target_modules": "all-linear"}],
    "krona_b": [{}, {"residual": False}],
    "prefix_tuning": [{"length": 4}, {"length": 4, "hidden": 12}],
    "llama_adapter": [{"length": 4}],
    "prompt_tuning": [{"length": 4}],
    "attention_fusion": [{"r": 8}],
    "adaptive_prefix_tuning": [{"length": 4}],
    "multitask_prompt_tuning": [{"length": 4}],
    "intrinsic_prompt_tuning": [{"length": 4, "intrinsic": 20, "hidden": 16}],
    "spot": [{"length": 4, "sources": source_prompts(4)}],
    "p_tuning": [{"length": 4, "hidden": 6}],
    "prefix_propagation": [{"length": 4}],
    "mam": [{"r": 8, "length": 4, "hidden": 12}],
    "layers": [
        {"layers": {"0": {"method": "lora", "r": 2}, "1": [{"method": "pfeiffer", "r": 4}, {"method": "lora"}]}},
        {"layers": {"0-": {"method": "lora", "r": 2}}},
    ],
    "s4": [{"share": 0.1}],
    "ssp": [{"share": 0.02}],
    "learned_adapter": [{"r": 8}],
    "lets": [{"density": 0.05}],
    "adamix": [{"r": 4}, {"r": 4, "shared_half": "up"}],
    "sparse_adapter": [{"r": 16, "criterion": name, "init_std": 0.1} for name in ("snip", "er")],
    "lst": [{"reduction": 2}, {"reduction": 4, "every": 1}],
    "unipelt": [{"adapter_r": 8, "lora_r": 2, "length": 4, "hidden": 12}],
    "diff_pruning": [{"alpha": 0.7, "target_modules": ["q_proj"]}],
    "peft": GENERIC,
}
"""Settings to test, where the defaults are not enough."""

QUANTIZED = {
    "nf4": QUANTIZERS.create("nf4"),
    "int4": QUANTIZERS.create("rtn", bits=4, group_size=32),
    "int8": QUANTIZERS.create("rtn", bits=8, group_size=32),
}
BACKBONES = ("dense", *QUANTIZED, "sparse", "shrunk")
"""sparse: two of four weights are zero, held dense. shrunk: a quarter of the neurons is gone from one MLP."""

HOSTS = {"s4": "4", "cross_attention_tuning": "2/t5/*.EncDecAttention.*", "top_layers": "2/llama/*.layers.1.*"}
"""Adapters that need more than two blocks, another architecture, or layers that are dense in a compressed model,
since it trains these weights themselves: what follows "nf4/" in a name of `backbone`."""

_backbones: dict[str, nn.Module] = {}


def backbone(kind: str) -> Any:
    """A fresh tiny model: a Llama, its linear layers compressed as `kind` says, with a number of blocks as in "nf4/6",
    of another architecture as in "nf4/2/t5", but for some layers as in "nf4/2/t5/*.wo"; or of the architecture `kind`.
    """
    if kind not in _backbones:
        compression, count, family, *skip = [*kind.split("/"), *("2", "llama")[kind.count("/") :]]
        if compression in ARCHITECTURES:
            family = compression
        llama = family == "llama" and compression not in ARCHITECTURES
        model: Any = build_tiny_llama(num_hidden_layers=int(count)) if llama else build_tiny(family, int(count))
        if compression in QUANTIZED:
            quantizer = QUANTIZED[compression].model_copy(update={"skip": tuple(skip)})
            quantize_model(model, quantizer, progress=False)
        elif compression == "sparse":
            for _, layer in linear_layers(model):
                groups = layer.weight.data.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)
        elif compression == "shrunk":
            block = sublayers(model)[0]
            end: Any = model.get_submodule(block.mlp_end)
            for layer in (model.get_submodule(name) for name in block.mlp_inputs):
                layer.weight = nn.Parameter(layer.weight.data[:96].clone())
                layer.out_features = 96
            end.weight = nn.Parameter(end.weight.data[:, :96].clone())
            end.in_features = 96
        _backbones[kind] = model
    return copy.deepcopy(_backbones[kind])


def cases() -> list[tuple[str, dict[str, Any]]]:
    return [(method, settings) for method in ADAPTERS for settings in SMALL.get(method, [{}])]


def label(method: str, settings: dict[str, Any]) -> str:
    """The method and what tells its cases apart; sizes of tests do not."""
    said = [method]
    for key, value in settings.items():
        if key in ("type", "init", "criterion"):
            said.append(str(value))
        elif isinstance(value, dict) and key != "settings":
            said.append("+".join(value))
        elif key not in ("r", "settings", "n_frequency", "sources"):
            said.append(f"{key}={value}" if isinstance(value, int | str) and value is not True else key)
    return " ".join(said)


def host(method: str, kind: str) -> str:
    """The backbone of this kind for this method; an architecture is what it is."""
    return kind if kind in ARCHITECTURES else f"{kind}/{HOSTS.get(method, '2')}"


def attached(adapter: Adapter, kind: str, moved: bool = True) -> PeftModel:
    """The adapted model in evaluation mode; `moved`: away from its initialization."""
    torch.manual_seed(0)
    model = adapter.attach(backbone(kind))
    if moved:
        perturb(model, size=0.1)
    return model.eval()


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    tokens = prompts() if tokens is None else tokens
    spoken = {"decoder_input_ids": tokens.flip(0)} if is_encoder_decoder(model) else {}
    with torch.no_grad():
        return model(input_ids=tokens, **spoken).logits


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss; the first three tokens are the prompt (of T5, all: it says them again)."""
    if is_encoder_decoder(model):
        return model(input_ids=tokens, labels=tokens).loss
    labels = tokens.clone()
    labels[:, :3] = -100
    end = torch.full((tokens.shape[0],), 2, device=tokens.device)
    return model(input_ids=tokens, labels=labels, **prompt_kwargs(model, end)).loss


def start(adapter: Adapter, kind: str) -> None:
    """Identity at initialization where declared; the parameters are as many as estimated."""
    base = backbone(kind)
    expected, flags = logits(base), [p.requires_grad for p in base.parameters()]
    estimate = adapter.estimate_parameters(base)
    assert torch.equal(logits(base), expected), "estimating changed the model"
    assert flags == [p.requires_grad for p in base.parameters()]
    model = attached(adapter, kind, moved=False)
    assert adapter.parameter_counts(model)["trainable"] == estimate > 0
    if adapter.identity_at_start:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    bytes_of = measure_storage(model)
    assert bytes_of.adapter_parameters >= estimate, (bytes_of.adapter_parameters, estimate)
    plain = measure_storage(backbone(kind))
    for part in ("parameters", "codes", "scales", "dense_linear", "embeddings", "other"):
        assert getattr(bytes_of, part) == getattr(plain, part), part


def learn(adapter: Adapter, kind: str) -> None:
    """Loss falls; every trainable tensor gets a gradient; nothing else changes."""
    model = attached(adapter, kind, moved=False).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    tokens, losses, moved = prompts(2, 8), [], set()
    for _ in range(6):
        loss = loss_of(model, tokens)
        loss.backward()
        moved |= {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-2:]) < losses[0] - 1e-3, losses
    assert not set(trained) - moved, f"no gradient: {sorted(set(trained) - moved)[:4]}"
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert _same(parameter, before[name]), f"{name} changed"
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers() if name in buffers)


def _same(left: Tensor, right: Tensor) -> bool:
    if hasattr(left, "components"):
        other = right.components()
        return all(torch.equal(tensor, other[name]) for name, tensor in left.components().items())
    return torch.equal(left, right)


def reload(adapter: Adapter, kind: str) -> None:
    """Saved and loaded on a fresh backbone, the outputs are equal; another random state does not matter."""
    model = attached(adapter, kind)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        torch.manual_seed(123)
        again = load_adapter(backbone(kind), folder).eval()
    assert torch.equal(logits(again), logits(model))
    fresh = dict(backbone(kind).named_parameters())
    with bare_backbone(model) as bare:
        for name, parameter in bare.named_parameters():
            assert _same(parameter, fresh.pop(name)), f"{name} of the backbone changed"
    assert not fresh


def disable(adapter: Adapter, kind: str) -> None:
    """Disabled, it is the backbone; enabled again, the adapter."""
    model, expected = attached(adapter, kind), logits(backbone(kind))
    adapted = logits(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)


def switch(adapter: Adapter, kind: str) -> None:
    """Two named adapters."""
    model = attached(adapter, kind)
    first = logits(model)
    adapter.attach(model, "second")
    perturb(model, seed=7, size=0.1)
    second = logits(model.eval())
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)


def merge(adapter: Adapter, kind: str) -> None:
    """Exact policies that are declared give the same outputs; "dense", where not declared, is refused."""
    model = attached(adapter, kind)
    expected = logits(model)
    declared = "dense" in adapter.merge_policies
    merged = MERGERS.create("dense").merge(model)
    assert declared, 'the policy "dense" took what is not declared'
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def checkpointing(adapter: Adapter, kind: str) -> None:
    """Gradient checkpointing gives the same gradients."""
    tokens, found = prompts(2, 8), []
    for enabled in (False, True):
        model = attached(adapter, kind).train()
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, tokens).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def cache(adapter: Adapter, kind: str) -> None:
    """Greedy generation with and without cache."""
    model = attached(adapter, kind)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompts())
    outputs = [
        model.generate(input_ids=prompts(), attention_mask=mask, use_cache=use, **settings) for use in (True, False)
    ]
    assert torch.equal(*outputs)


def padding(adapter: Adapter, kind: str) -> None:
    """A left-padded batch says what its rows say alone."""
    model = attached(adapter, kind)
    tokens, mask = padded("left")
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    end = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    if is_encoder_decoder(model):
        return _padded_source(model, tokens, mask)
    with torch.no_grad():
        together = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, **prompt_kwargs(model, end)
        ).logits
        for row in range(len(tokens)):
            alone_ids = tokens[row : row + 1, mask[row].bool()]
            last = torch.tensor([alone_ids.shape[1] - 1], device=tokens.device)
            alone = model(input_ids=alone_ids, **prompt_kwargs(model, last)).logits
            torch.testing.assert_close(together[row, -alone_ids.shape[1] :], alone[0], rtol=1e-3, atol=1e-3)


def _padded_source(model: Any, tokens: Tensor, mask: Tensor) -> None:
    """`padding` of an encoder-decoder: only the encoder's text is padded."""
    spoken = torch.arange(3, 8, device=tokens.device)[None]
    with torch.no_grad():
        target = {"decoder_input_ids": spoken.expand(len(tokens), -1)}
        together = model(input_ids=tokens, attention_mask=mask, **target).logits
        for row in range(len(tokens)):
            alone = model(input_ids=tokens[row : row + 1, mask[row].bool()], decoder_input_ids=spoken).logits
            torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)


def bfloat16(adapter: Adapter, kind: str) -> None:
    """On a bfloat16 backbone the adapter is float32, named after itself, and trains."""
    torch.manual_seed(0)
    model = adapter.attach(backbone(kind).to(torch.bfloat16), "mine")
    perturb(model, size=0.1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    loss_of(model, prompts(2, 8)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert logits(model).dtype == torch.bfloat16


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a case without names of layers, for any architecture."""
    named = isinstance(settings.get("target_modules"), list)
    return settings | {"target_modules": "all-linear", "structured": False} if named else settings


Line = Callable[[Adapter, str], None]
LINES: dict[str, Line] = {
    line.__name__: line
    for line in (start, learn, reload, disable, switch, merge, checkpointing, cache, padding, bfloat16)
}


def expected(line: str, method: str, settings: dict[str, Any], kind: str) -> str:
    """ "pass", or "refused" where the method cannot do this by its nature."""
    adapter = ADAPTERS.create(method, **settings)
    compressed = kind in QUANTIZED
    impossible = (
        (compressed and bool(adapter.needs_dense()) and not adapter.own_layers_dense)
        or (method in ("qa_lora", "l4q") and kind == "nf4")  # a table has no zeros or step sizes to change
        or (method == "alphatuning" and kind not in ("int4", "int8"))  # it trains the scales of integer codes
        or (method == "cross_attention_tuning" and kind in ARCHITECTURES and "t5" not in kind)
        or (method == "ln_tuning" and line == "bfloat16")  # peft trains the normalizations in their own dtype
        or (line == "merge" and "dense" not in adapter.merge_policies)  # nothing is equal to it
        or (line == "merge" and "pfeiffer" in str(settings))  # one of `layers`
    )
    return "refused" if impossible else "pass"


def outcome(line: str, method: str, settings: dict[str, Any], kind: str) -> str:
    """ "pass", or "refused: reason". Anything else raises."""
    try:
        LINES[line](ADAPTERS.create(method, **settings), host(method, kind))
    except UserError as error:
        return "refused: " + error.problems[0].what
    return "pass"
