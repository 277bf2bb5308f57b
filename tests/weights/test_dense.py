"""The C kernel of dense layers against torch, and everything that must keep going to torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress_peft.loading import load
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.weights import NF4Weight, dense, native

pytestmark = pytest.mark.skipif(not native.has_dense(), reason="there is no kernel for dense layers here")


def layer(out_features: int, in_features: int, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(in_features, out_features, bias)
    dense.use_kernels(made)
    return made


@pytest.fixture
def calls(monkeypatch):
    """Grows by one at each product that the kernel does."""
    found: list[tuple[int, ...]] = []
    run = native.dense_matmul

    def counted(weight, bias, x, out):
        found.append(tuple(x.shape))
        run(weight, bias, x, out)

    monkeypatch.setattr(native, "dense_matmul", counted)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 15, 16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 8), (64, 33), (65, 576), (1537, 100)])
def test_product(shape, rows, bias, calls):
    linear = layer(*shape, bias)
    x = torch.randn(rows, shape[1])
    want = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.no_grad():
        got = linear(x)
    assert calls == [(rows, shape[1])] and got.shape == want.shape
    assert (got - want).abs().max() <= 2e-6 * max(want.abs().max(), 1)


def test_a_row_does_not_depend_on_the_others():
    linear, x = layer(200, 100), torch.randn(16, 100)
    with torch.no_grad():
        together = linear(x[None])
        assert together.shape == (1, 16, 200)
        for row in range(16):
            for others in range(1, 16 - row):
                assert torch.equal(linear(x[row : row + others])[0], together[0, row])


@torch.no_grad()
def test_what_the_kernel_cannot_do_goes_to_torch(calls):
    linear = layer(48, 64)
    same = nn.Linear(64, 48, bias=False)
    same.load_state_dict(linear.state_dict())
    wide = torch.randn(4, 128)
    for x in (torch.randn(dense.FEW_ROWS + 1, 64), wide[:, ::2], wide[:, :64].t().contiguous().t()):
        assert torch.equal(linear(x), same(x))
    assert linear(torch.randn(0, 64)).shape == (0, 48)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(1, 65))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(1, 64)).dtype == torch.bfloat16
    linear.bfloat16()
    assert linear(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    linear.float()
    linear.weight.data = linear.weight.data.t().contiguous().t()
    linear(torch.randn(1, 64))
    assert not [shape for shape in calls if shape[0]]


def test_gradients_are_those_of_torch(calls):
    linear, x = layer(8, 16, bias=True), torch.randn(2, 16)
    linear(x).sum().backward()
    assert torch.allclose(linear.weight.grad, x.sum(0).expand(8, 16))
    linear.requires_grad_(False)
    x.requires_grad_()
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(2, 16))
    assert not calls
    linear(x.detach())  # nothing here needs a gradient
    assert calls


@torch.no_grad()
def test_those_who_listen_to_torch_hear_the_product(calls):
    linear, x = layer(8, 16), torch.randn(3, 16)
    want = x @ linear.weight.T
    assert torch.allclose(torch.vmap(linear)(x), want, atol=1e-6)
    assert torch.allclose(torch.compile(linear, backend="eager", fullgraph=True)(x), want, atol=1e-6)
    with FlopCounterMode(display=False) as counter:
        linear(x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 16
    traced = torch.jit.trace(linear, torch.zeros(3, 16), check_trace=False)
    assert torch.allclose(traced(x), want, atol=1e-6)
    assert not calls


@torch.no_grad()
def test_copies_have_their_own_weight(calls):
    linear, x = layer(8, 16), torch.randn(1, 16)
    other = copy.deepcopy(linear)
    other.weight.zero_()
    assert not other(x).any() and linear(x).all() and len(calls) == 2
    again = pickle.loads(pickle.dumps(linear))
    assert torch.allclose(again(x), linear(x), atol=1e-6)


@torch.no_grad()
def test_a_weight_that_is_compressed_later(calls):
    linear, x = layer(8, 64), torch.randn(1, 64)
    linear.weight = nn.Parameter(NF4Weight.quantize(linear.weight.data, 64, False), requires_grad=False)
    assert torch.allclose(linear(x), x @ linear.weight.dequantize().T, atol=1e-5) and not calls
    before = nn.Linear(64, 8, bias=False)
    before.weight = linear.weight
    dense.use_kernels(before)
    assert "forward" not in vars(before)  # it would only cost time


def test_layers_with_a_way_of_their_own_stay(tiny_llama):
    class Own(nn.Linear):
        pass

    def replaced(x):
        return x

    tiny_llama.lm_head = Own(64, 128)
    taken = tiny_llama.model.layers[0].mlp.up_proj
    taken.forward = replaced
    dense.use_kernels(tiny_llama)
    assert taken.forward is replaced and "forward" not in vars(tiny_llama.lm_head)


@torch.no_grad()
def test_a_loaded_model_decodes_with_it(tiny_llama, tmp_path, calls):
    tiny_llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    ids = torch.tensor([[5, 9, 17, 3]])
    want = tiny_llama.generate(ids, max_new_tokens=12, do_sample=False, min_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, min_new_tokens=12), want)
    products = 2 * 7 + 1  # two blocks of seven linear layers, and the head
    assert len(calls) == 12 * products
    assert model.state_dict().keys() == tiny_llama.state_dict().keys()


def test_portable_c_leaves_dense_layers_to_torch(monkeypatch):
    native.available.cache_clear()
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    try:
        assert "forward" not in vars(layer(8, 8))
    finally:
        native.available.cache_clear()
