"""What every adapter must do, one function a line; `python -m tests.adapters.contract` prints the matrix.

A line passes, or raises a UserError: a refusal with its reason. Anything else is a failure.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from compress_peft.adapters import ADAPTERS, Adapter
from compress_peft.errors import UserError
from compress_peft.merging import MERGERS
from compress_peft.models.bundle import bare_backbone, load_adapter, save_adapter
from compress_peft.models.layers import linear_layers
from compress_peft.models.prompts import prompt_kwargs
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from eval.storage import measure_storage
from tests.adapters.helpers import padded, perturb, prompts
from tests.conftest import build_tiny_llama

GENERIC: list[dict[str, Any]] = [
    *({"type": name} for name in ("beft", "miss", "pvera", "hira")),
    {"type": "road", "settings": {"group_size": 16}},
    {"type": "waveft", "settings": {"n_frequency": 50}},
]

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
    "krona": [{}, {"a_shape": (4, 2), "target_modules": "all-linear"}],
    "krona_b": [{}, {"residual": False}],
    "prefix_tuning": [{"length": 4}, {"length": 4, "hidden": 12}],
    "llama_adapter": [{"length": 4}],
    "prompt_tuning": [{"length": 4}],
    "adaptive_prefix_tuning": [{"length": 4}],
    "p_tuning": [{"length": 4, "hidden": 6}],
    "prefix_propagation": [{"length": 4}],
    "mam": [{"r": 8, "length": 4, "hidden": 12}],
    "layers": [
        {"layers": {"0": {"method": "lora", "r": 2}, "1": [{"method": "pfeiffer", "r": 4}, {"method": "lora"}]}},
        {"layers": {"0-": {"method": "lora", "r": 2}}},
    ],
    "s4": [{"share": 0.1}],
    "adamix": [{"r": 4}, {"r": 4, "shared_half": "up"}],
    "sparse_adapter": [{"r": 16, "criterion": name, "init_std": 0.1} for name in ("snip", "er")],
    "lst": [{"reduction": 2}, {"reduction": 4, "every": 1}],
    "unipelt": [{"adapter_r": 8, "lora_r": 2, "length": 4, "hidden": 12}],
    "diff_pruning": [{"alpha": 0.7, "target_modules": ["q_proj"]}],
    "peft": GENERIC,
}
"""Settings to test, where the defaults are not enough."""

BACKBONES = ("dense", "nf4", "rtn", "sparse", "shrunk")
"""sparse: two of four weights are zero, held dense. shrunk: a quarter of the neurons is gone from one MLP."""

BLOCKS = {"s4": 4}
"""Adapters that need more blocks than two."""

_backbones: dict[str, nn.Module] = {}


def backbone(kind: str) -> Any:
    """A fresh tiny model, its linear layers compressed as `kind` says; with a number of blocks as in "nf4/6"."""
    if kind not in _backbones:
        compression, _, blocks = kind.partition("/")
        model = build_tiny_llama(num_hidden_layers=int(blocks or 2))
        if compression in QUANTIZERS:
            settings = {"group_size": 32} if compression == "rtn" else {}
            quantize_model(model, QUANTIZERS.create(compression, **settings), progress=False)
        elif compression == "sparse":
            for _, layer in linear_layers(model):
                groups = layer.weight.data.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)
        elif compression == "shrunk":
            mlp = model.model.layers[0].mlp
            for layer in (mlp.gate_proj, mlp.up_proj):
                layer.weight = nn.Parameter(layer.weight.data[:96].clone())
                layer.out_features = 96
            mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.data[:, :96].clone())
            mlp.down_proj.in_features = 96
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
        elif key not in ("r", "settings", "n_frequency"):
            said.append(f"{key}={value}" if isinstance(value, int | str) and value is not True else key)
    return " ".join(said)


def attached(adapter: Adapter, kind: str, moved: bool = True) -> PeftModel:
    """The adapted model in evaluation mode; `moved`: away from its initialization."""
    torch.manual_seed(0)
    model = adapter.attach(backbone(kind))
    if moved:
        perturb(model, size=0.1)
    return model.eval()


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=prompts() if tokens is None else tokens).logits


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss; the first three tokens are the prompt."""
    labels = tokens.clone()
    labels[:, :3] = -100
    end = torch.full((tokens.shape[0],), 2)
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
    end = torch.full((len(tokens),), tokens.shape[1] - 1)
    with torch.no_grad():
        together = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, **prompt_kwargs(model, end)
        ).logits
        for row in range(len(tokens)):
            alone_ids = tokens[row : row + 1, mask[row].bool()]
            last = torch.tensor([alone_ids.shape[1] - 1])
            alone = model(input_ids=alone_ids, **prompt_kwargs(model, last)).logits
            torch.testing.assert_close(together[row, -alone_ids.shape[1] :], alone[0], rtol=1e-3, atol=1e-3)


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


Line = Callable[[Adapter, str], None]
LINES: dict[str, Line] = {
    line.__name__: line
    for line in (start, learn, reload, disable, switch, merge, checkpointing, cache, padding, bfloat16)
}


def outcome(line: str, method: str, settings: dict[str, Any], kind: str) -> str:
    """ "pass", or "refused: reason". Anything else raises."""
    try:
        LINES[line](ADAPTERS.create(method, **settings), f"{kind}/{BLOCKS.get(method, 2)}")
    except UserError as error:
        return "refused: " + error.problems[0].what
    return "pass"


def measures(adapter: Adapter, kind: str) -> list[str]:
    """Trainable parameters, KiB that autograd keeps of a forward pass of 2 x 8 tokens, and ms of a training step."""
    model = attached(adapter, kind, moved=False).train()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters() if not hasattr(p, "components")}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "components") and tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, prompts(2, 8)).backward()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        loss_of(model, prompts(2, 8)).backward()
        seconds.append(time.perf_counter() - started)
    return [f"{count}", f"{sum(kept.values()) / 1024:.0f}", f"{1000 * min(seconds):.0f}"]


def main(*wanted: str) -> None:
    """Prints the matrix as Markdown, of these methods or all; totals and reasons stand below it."""
    reasons: dict[str, int] = {}
    totals: Counter[str] = Counter()
    columns = ["parameters", "kept, KiB", "step, ms"]
    print("| adapter | backbone |", " | ".join([*LINES, *columns]), "|")
    print("|---" * (len(LINES) + len(columns) + 2) + "|")
    for method, settings in cases():
        if wanted and method not in wanted:
            continue
        for kind in BACKBONES:
            cells = []
            for line in LINES:
                try:
                    found = outcome(line, method, settings, kind)
                except Exception as error:
                    found = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
                totals[found.partition(":")[0]] += 1
                if found != "pass":
                    number = reasons.setdefault(found, len(reasons) + 1)
                    found = f"{found.partition(':')[0]} ({number})"
                cells.append(found)
            try:
                cells += measures(ADAPTERS.create(method, **settings), f"{kind}/{BLOCKS.get(method, 2)}")
            except UserError:
                cells += ["-"] * len(columns)
            print(f"| {label(method, settings)} | {kind} | {' | '.join(cells)} |", flush=True)
    print("\n" + ", ".join(f"{count} {name}" for name, count in totals.most_common()))
    for reason, number in reasons.items():
        print(f"\n{number}. {reason}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
