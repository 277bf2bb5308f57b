"""Attention by the C kernels, against float64, and everything that must keep going to torch."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress_peft import load
from compress_peft.adapters import PrefixTuning
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.weights import attention, blocks, native
from compress_peft.weights.inference import use_kernels
from tests.adapters.helpers import perturb
from tests.conftest import build_tiny_llama

pytestmark = pytest.mark.skipif(not native.has_dense(), reason="there are no C kernels here")

SHAPES = [
    # rows, heads, kv_heads, tokens, dim
    (1, 9, 3, 576, 64),
    (2, 9, 3, 100, 64),
    (3, 8, 8, 33, 40),
    (1, 8, 1, 7, 16),
    (1, 32, 8, 1025, 128),
    (2, 4, 2, 1, 8),
    (1, 10, 2, 301, 72),
]


@pytest.fixture
def calls(monkeypatch):
    """Grows by one at each attention that a kernel does: the queries it had."""
    found: list[int] = []
    for name in ("attention", "prefill"):
        run = getattr(native, name)
        monkeypatch.setattr(native, name, lambda q, *others, run=run: (found.append(q.shape[2]), run(q, *others)))
    return found


def inputs(rows: int, heads: int, kv_heads: int, tokens: int, dim: int, spare: int = 5) -> tuple[Tensor, ...]:
    """Query, and keys and values with room for `spare` tokens more behind them."""
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(rows, heads, 1, dim, generator=generator)
    held = torch.randn(2, rows, kv_heads, tokens + spare, dim, generator=generator)
    return query, held[0, :, :, :tokens], held[1, :, :, :tokens]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The formula in float64; (rows, 1, heads, dim)."""
    query, key, value = query.double(), key.double(), value.double()
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, dim=1).transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(shared, dim=1)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(shape, masked, threads, calls):
    query, key, value = inputs(*shape)
    mask = None
    if masked:
        mask = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(1)) > 0.3
        mask[..., -1] = True
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, _ = attention.forward(torch.nn.Module(), query, key, value, mask, scaling=0.2)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 1 and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact(query, key, value, mask, 0.2), atol=5e-6, rtol=0)


@torch.no_grad()
def test_scores_far_apart_and_a_mask_for_all_rows(calls):
    query, key, value = inputs(2, 4, 2, 40, 16)
    mask = torch.arange(40).view(1, 1, 1, 40) % 3 > 0
    got, _ = attention.forward(torch.nn.Module(), 300 * query, key, value, mask)
    torch.testing.assert_close(got.double(), exact(300 * query, key, value, mask), atol=1e-5, rtol=0)
    wide, _ = attention.forward(torch.nn.Module(), query, key, value, mask.expand(2, 1, 1, 40))
    torch.testing.assert_close(wide.double(), exact(query, key, value, mask), atol=5e-6, rtol=0)
    assert len(calls) == 2


@torch.no_grad()
def test_a_number_that_is_none_shows(calls):
    query, key, value = inputs(1, 2, 1, 60, 16)
    key[0, 0, 7, 3] = torch.nan
    got, _ = attention.forward(torch.nn.Module(), query, key, value, None)
    assert len(calls) == 1 and got.isnan().all()


MANY = [
    # rows, heads, kv_heads, queries, tokens, dim
    (1, 9, 3, 130, 130, 64),
    (2, 4, 2, 64, 64, 16),
    (2, 4, 2, 97, 97, 48),
    (1, 6, 6, 300, 300, 128),
    (1, 2, 1, 70, 70, 256),
]


def many_inputs(rows: int, heads: int, kv_heads: int, queries: int, tokens: int, dim: int) -> tuple[Tensor, ...]:
    """As transformers hands them over: queries with their heads inside, keys and values with room behind."""
    _, key, value = inputs(rows, heads, kv_heads, tokens, dim)
    query = 3 * torch.randn(rows, queries, heads, dim, generator=torch.Generator().manual_seed(3))
    return query.transpose(1, 2), key, value


@torch.no_grad()
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("kind", ["causal", "all", "mask", "one mask"])
@pytest.mark.parametrize("shape", MANY)
def test_it_is_the_formula_for_many_queries(shape, kind, isa, calls, monkeypatch):
    if isa == "avx512" and native.available() != "avx512":
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(native, "available", lambda: isa)
    query, key, value = many_inputs(*shape)
    rows, queries, tokens = shape[0], shape[3], shape[4]
    seen = torch.ones(1, 1, queries, tokens, dtype=torch.bool)
    if kind == "causal":
        seen = seen.tril()
    elif "mask" in kind:
        seen = torch.rand(1 if "one" in kind else rows, 1, queries, tokens, generator=torch.Generator().manual_seed(1))
        seen = (seen > 0.7) & (torch.arange(tokens) < 70)  # so that whole tiles are hidden
        seen[..., 1] = True
    mask = seen if "mask" in kind else None
    got, _ = attention.forward(torch.nn.Module(), query, key, value, mask, scaling=0.2, is_causal=kind != "all")
    assert calls == [queries] and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact(query, key, value, seen, 0.2), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("padding", [3, 47, 48, 64, 101, 129])
def test_padding_is_zero_and_stays_out(padding, isa, calls, monkeypatch):
    """Queries of padding at the start see nothing: a number that is none there would reach all others a block later."""
    if isa == "avx512" and native.available() != "avx512":
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(native, "available", lambda: isa)
    query, key, value = many_inputs(2, 4, 2, 130, 130, 32)
    seen = torch.ones(2, 1, 130, 130, dtype=torch.bool).tril()
    seen[0, :, :, :padding] = False
    got, _ = attention.forward(torch.nn.Module(), query, key, value, seen)
    want = exact(query, key, value, seen).nan_to_num(0)
    assert not want[0, :padding].any() and calls == [130]
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    value[1, 0, 5, 3] = torch.nan
    key[0, 1, 129] = torch.nan
    broken, _ = attention.forward(torch.nn.Module(), query, key, value, seen)
    assert broken[1, 5:, :2, 3].isnan().all() and broken[0, 129, 2:].isnan().all()
    assert torch.equal(broken[0, :129], got[0, :129])


@torch.no_grad()
def test_a_model_reads_rows_with_much_padding():
    plain, quick = build_tiny_llama(), build_tiny_llama()
    use_kernels(quick)
    ids = torch.randint(3, 128, (3, 120), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(120) >= torch.tensor([[0], [50], [110]])).long()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    want, got = (
        model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits for model in (plain, quick)
    )
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_queries_behind_a_cache(calls):
    query, key, value = many_inputs(2, 4, 2, 65, 90, 32)
    seen = torch.arange(90) <= 25 + torch.arange(65)[:, None]
    got, _ = attention.forward(torch.nn.Module(), query, key, value, seen[None, None])
    torch.testing.assert_close(got.double(), exact(query, key, value, seen), atol=1e-5, rtol=0)
    assert calls == [65]


def test_everything_else_goes_to_torch(calls):
    query, key, value = inputs(2, 4, 2, 24, 16)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **settings: object) -> Tensor:
        return attention.forward(module, q, k, v, mask, **settings)[0].double()

    want = exact(query, key, value)
    with torch.no_grad():
        assert torch.allclose(run(query, key, value, torch.zeros(2, 1, 1, 24)), want, atol=1e-5)
        by_head = torch.ones(2, 4, 1, 24, dtype=torch.bool)
        assert torch.allclose(run(query, key, value, by_head), want, atol=1e-5)
        assert torch.allclose(run(*(x.bfloat16() for x in (query, key, value))), want, atol=5e-2)
        apart = query.transpose(1, 3).contiguous().transpose(1, 3)
        assert torch.allclose(run(apart, key, value), want, atol=1e-5)
        bias = torch.randn(1, 4, 1, 24, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(run(query, key, value, position_bias=bias), want, atol=1e-2)
        few = run(query.expand(2, 4, 3, 16), key, value)  # three queries see the first three tokens
        assert torch.allclose(few[:, 2:], exact(query, key[:, :, :3], value[:, :, :3]), atol=1e-5)
        _, *narrow = inputs(1, 2, 1, 99, 24)  # the kernel for many queries takes 16 numbers at a time
        assert run(narrow[0].expand(1, 2, 99, 24), *narrow).shape == (1, 99, 2, 24)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(query, key, value), want, atol=1e-5)
    query.requires_grad_()
    run(query, key, value).sum().backward()
    assert query.grad is not None and not calls


@torch.no_grad()
def test_a_loaded_model_decodes_with_it_and_keeps_it_to_itself(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(blocks, "_plan", lambda *of: None)  # which call the kernel themselves
    tiny_llama = build_tiny_llama()
    tiny_llama.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    model, _ = load(tmp_path / "dense")
    prompts = torch.randint(3, 128, (2, 70), generator=torch.Generator().manual_seed(0))
    settings: dict[str, object] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    seen = torch.ones_like(prompts)
    seen[0, :3] = 0
    for own in ({}, {"num_beams": 3}):
        want = tiny_llama.generate(prompts, attention_mask=seen, **settings, **own)
        assert torch.equal(model.generate(prompts, attention_mask=seen, **settings, **own), want)
    assert calls == 2 * ([70, 70] + 22 * [1])  # two blocks, the prompts and then every token but the first
    model.save_pretrained(tmp_path / "again")
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    calls.clear()
    model.set_attn_implementation("sdpa")
    model.generate(prompts, attention_mask=seen, **settings)
    assert not calls


@torch.no_grad()
def test_prefixes_still_come_before_the_keys(calls):
    plain, quick = build_tiny_llama(), build_tiny_llama()
    use_kernels(quick)
    ids = torch.tensor([[5, 9, 17, 3]])
    found = []
    for model in (plain, quick):
        torch.manual_seed(0)
        adapted = PrefixTuning(length=3).attach(model).eval()
        perturb(adapted, size=0.7)
        found.append(adapted.generate(input_ids=ids, max_new_tokens=9, min_new_tokens=9, do_sample=False))
    assert torch.equal(*found) and calls


def test_models_that_chose_another_attention_keep_it():
    for implementation in ("eager", "flex_attention"):
        model = build_tiny_llama()
        model.config._attn_implementation = implementation
        use_kernels(model)
        assert model.config._attn_implementation == implementation
