"""RMS norms that call the C kernel, against float64, and everything that must keep going to torch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from compress_peft.adapters import ADAPTERS
from compress_peft.weights import native, norms
from compress_peft.weights.inference import use_kernels
from tests.adapters.helpers import prompts
from tests.conftest import build_tiny_llama

pytestmark = pytest.mark.skipif(not native.has_dense(), reason="there are no C kernels here")


def make(kind: type = LlamaRMSNorm, size: int = 100, eps: float = 1e-6) -> torch.nn.Module:
    norm = kind(size, eps=eps)
    norm.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(0))
    use_kernels(norm)
    return norm


@pytest.fixture
def calls(monkeypatch):
    """Grows by one at each norm that the kernel does."""
    found = []
    run = native.rms_norm
    monkeypatch.setattr(native, "rms_norm", lambda x, *others: (found.append(tuple(x.shape)), run(x, *others)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm, T5LayerNorm])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7), (1, 16), (2, 2, 33), (16, 576), (1, 4096)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_is_the_formula(kind, shape, eps, calls):
    norm = make(kind, shape[-1], eps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    want = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    got = norm(x)
    assert calls == [shape] and got.shape == shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@torch.no_grad()
def test_a_norm_that_computes_something_else_is_left_alone(calls):
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Coarse(LlamaRMSNorm):  # without epsilon
        def forward(self, hidden_states):
            return self.weight * hidden_states / hidden_states.square().mean(-1, keepdim=True).sqrt()

    for kind in (GemmaRMSNorm, Doubled, Coarse):
        norm = make(kind, eps=1e-3)
        assert "forward" not in vars(norm)
        norm(torch.randn(1, 100))
    assert not calls


def test_what_the_kernel_cannot_do_goes_to_torch(calls):
    norm, x = make(), torch.randn(3, 100)
    assert norm(x).requires_grad  # the weight trains
    with torch.no_grad():
        assert norm(torch.empty(0, 100)).shape == (0, 100)
        rows = torch.randn(2, 200)
        calls.clear()
        assert torch.allclose(norm(rows[:, ::2]), norm(rows[:, ::2].contiguous()), atol=1e-5) and len(calls) == 1
        assert norm(torch.randn(17, 100)).shape == (17, 100)
        assert norm(x.bfloat16()).dtype == torch.promote_types(torch.bfloat16, norm.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16):
            norm(x)
        assert len(calls) == 1
        moved = copy.deepcopy(norm)
        moved.weight.data.zero_()
        assert not moved(x).any() and norm(x).any() and len(calls) == 3
        assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), LlamaRMSNorm.forward(norm, x))
    assert len(calls) == 3


@pytest.mark.parametrize(("method", "in_training"), [("ln_tuning", 0), ("lora", 1), ("full", 0)])
def test_adapters_train_and_decode(method, in_training, calls):
    """What has no gradient yet, the first norm before an adapter, may be the kernel's in training too."""
    model = build_tiny_llama()
    use_kernels(model)
    adapted = ADAPTERS.create(method).attach(model).train()
    adapted(input_ids=prompts(2, 8), labels=prompts(2, 8)).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad) and len(calls) == in_training
    calls.clear()
    with torch.no_grad():
        adapted.eval()(input_ids=prompts(1, 2))
    assert len(calls) == 5


def test_a_model_on_another_device_is_left_alone():
    with torch.device("meta"):
        norm = LlamaRMSNorm(8)
    norms.use_kernel(norm)
    assert "forward" not in vars(norm)
