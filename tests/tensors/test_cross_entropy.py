"""Cross-entropy in parts against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress_peft.tensors import cross_entropy as module
from compress_peft.tensors.cross_entropy import IGNORED, cross_entropy


@pytest.fixture(params=[1, 100, 1 << 22], ids=["a position", "some", "all"])
def at_a_time(request, monkeypatch):
    monkeypatch.setitem(module.AT_A_TIME, "cpu", request.param)


def example(dtype, ignored=()):
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 7, 33)).to(dtype).requires_grad_()
    targets = torch.randint(0, 33, (3, 7))
    for place in ignored:
        targets[place] = IGNORED
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [(), ((0, 0), (1, slice(2, None)), (2,))], ids=["none", "some"])
def test_values_and_gradients(dtype, ignored, at_a_time):
    logits, targets = example(dtype, ignored)
    weights = torch.rand(3, 7)
    losses = cross_entropy(logits, targets)
    (losses * weights).sum().backward()
    found, logits.grad = logits.grad, None
    wanted = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    (wanted * weights).sum().backward()
    assert losses.dtype == torch.float32 and found.dtype == dtype
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(found, logits.grad)
    assert not losses[targets == IGNORED].any() and not found[targets == IGNORED].any()


def test_large_logits_do_not_overflow(at_a_time):
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, 0.0]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([1, 0]))
    losses.sum().backward()
    assert losses.tolist() == [2e4, 0.0]
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_nothing_to_predict(at_a_time):
    logits, targets = example(torch.float32, [slice(None)])
    losses = cross_entropy(logits, targets)
    losses.sum().backward()
    assert not losses.any() and not logits.grad.any()


def test_infinite_logits_are_told(at_a_time):
    logits, targets = example(torch.float32)
    with torch.no_grad():
        logits[1, 2, 3] = torch.nan
    losses = cross_entropy(logits, targets)
    assert losses.isnan().nonzero().tolist() == [[1, 2]]


def test_no_float32_copy_of_the_logits(monkeypatch):
    monkeypatch.setitem(module.AT_A_TIME, "cpu", 99)
    logits, targets = example(torch.bfloat16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Watch():
        cross_entropy(logits, targets).sum().backward()
    assert 0 < largest <= 99
