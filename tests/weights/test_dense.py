"""Layers that call the C kernels themselves, against torch, and everything that must keep going to torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from compress_peft.loading import load
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.quantization import QUANTIZERS
from compress_peft.weights import blocks, compressed, inference, native, products

pytestmark = pytest.mark.skipif(not native.has_dense(), reason="there is no kernel for dense layers here")


def layer(out_features: int, in_features: int, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(in_features, out_features, bias)
    inference.use_kernels(made)
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
def test_the_argument_keeps_its_name(calls):
    """Libraries that look up the signature of `nn.Linear` call it by name."""
    linear, x = layer(48, 64), torch.randn(4, 64)
    assert torch.equal(linear(input=x), linear(x))
    assert len(calls) == 2


@torch.no_grad()
def test_what_the_kernel_cannot_do_goes_to_torch(calls):
    linear = layer(48, 64)
    same = nn.Linear(64, 48, bias=False)
    same.load_state_dict(linear.state_dict())
    wide = torch.randn(4, 128)
    for x in (wide[:, ::2], wide[:, :64].t().contiguous().t()):
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


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(17,), (2, 40), (3, 1, 100)])
def test_many_rows_go_to_the_faster_library(rows, bias, calls, monkeypatch):
    linear, x = layer(48, 33, bias), torch.randn(*rows, 33)
    asked = []

    def product(*tensors):
        asked.append(tensors)
        return functional.linear(*tensors)

    want = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    assert (linear(x) - want).abs().max() < 1e-5  # whichever it is here
    for found in (None, product):
        monkeypatch.setattr(products, "onednn", lambda found=found: found)
        assert torch.equal(linear(x), functional.linear(x, linear.weight, linear.bias))
    assert len(asked) == 1 and not calls
    assert linear(torch.randn(0, 33)).shape == (0, 48) and len(asked) == 1
    with torch.autocast("cpu", torch.bfloat16):
        linear(x)
    with torch.enable_grad():
        linear(x).sum().backward()
    assert torch.allclose(linear.weight.grad, x.flatten(0, -2).sum(0).expand(48, 33), atol=1e-4)
    assert len(asked) == 1


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


@pytest.fixture
def dispatched(monkeypatch):
    """Grows by one at each product of a compressed weight that passes through torch."""
    found: list[tuple[int, ...]] = []
    run = compressed._linear

    def counted(x, *others):
        found.append(tuple(x.shape))
        return run(x, *others)

    monkeypatch.setattr(compressed, "_linear", counted)
    return found


def compress_layer(linear: nn.Linear, grid: str) -> nn.Linear:
    """The layer, its weight compressed, and the product of it ready."""
    compact = QUANTIZERS.create(grid).quantize(linear.weight.detach())
    linear.weight = nn.Parameter(compact, requires_grad=False)
    with torch.no_grad():
        linear(torch.randn(1, linear.in_features))
    return linear


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", ["nf4", "rtn"])
def test_a_compressed_weight_skips_the_dispatch(grid, bias, calls, dispatched):
    linear = compress_layer(layer(64, 128, bias), grid)
    assert len(dispatched) == 1
    for rows in (1, 3, 16):
        x = torch.randn(1, rows, 128)
        assert torch.equal(linear(x), functional.linear(x, linear.weight, linear.bias))
    assert len(dispatched) == 4 and not calls  # those that the test asked torch for
    other = copy.deepcopy(linear)
    assert torch.equal(other(x), linear(x)) and len(dispatched) == 5  # the copy's own first product
    linear.weight = nn.Parameter(torch.randn(64, 128))
    assert torch.allclose(linear(x), functional.linear(x, linear.weight, linear.bias), atol=1e-5)
    assert len(calls) == 1


@torch.no_grad()
def test_torch_hears_of_a_compressed_weight(dispatched):
    linear = compress_layer(layer(64, 128, bias=True), "rtn")
    x = torch.randn(3, 128)
    want, dense = linear(x), linear.weight.dequantize()
    assert len(dispatched) == 1

    def through_torch(run):
        before = len(dispatched)
        result = run()
        assert len(dispatched) > before
        return result

    assert through_torch(lambda: linear(torch.randn(17, 128))).shape == (17, 64)
    assert through_torch(lambda: linear(torch.randn(1, 256)[:, ::2])).shape == (1, 64)
    assert through_torch(lambda: linear(x.bfloat16())).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert through_torch(lambda: linear(x)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="does not fit weight"):
        through_torch(lambda: linear(torch.randn(1, 129)))
    with torch.enable_grad():
        asked = x.clone().requires_grad_()
        through_torch(lambda: linear(asked)).sum().backward()
        assert torch.allclose(asked.grad, dense.sum(0).expand(3, 128), atol=1e-4)
        linear.bias.grad = None
        through_torch(lambda: linear(x)).sum().backward()
        assert torch.equal(linear.bias.grad, torch.full((64,), 3.0))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), want, atol=1e-5)


def test_layers_with_a_way_of_their_own_stay(tiny_llama):
    class Own(nn.Linear):
        pass

    def replaced(x):
        return x

    tiny_llama.lm_head = Own(64, 128)
    taken = tiny_llama.model.layers[0].mlp.up_proj
    taken.forward = replaced
    inference.use_kernels(tiny_llama)
    assert taken.forward is replaced and "forward" not in vars(tiny_llama.lm_head)


@torch.no_grad()
def test_a_loaded_model_decodes_with_it(tiny_llama, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(blocks, "_plan", lambda *of: None)  # which call the kernel themselves
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
