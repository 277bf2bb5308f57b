"""The compressed weight inside nn.Linear: what works, what raises, what peft makes of it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compress_peft.errors import UserError
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import CompressedWeight, NF4Weight, UnsupportedOperation


def layer(out_features: int = 96, in_features: int = 128, bias: bool = True, **options: bool) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias)
    linear.weight = nn.Parameter(NF4Weight.quantize(linear.weight.detach(), **options), requires_grad=False)
    return linear


@pytest.mark.parametrize("in_features", [128, 100])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (40,), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_dense(shape, in_features, bias):
    linear = layer(in_features=in_features, bias=bias)
    dense = linear.weight.dequantize()
    x = torch.randn(*shape, in_features, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out, want = linear(x), functional.linear(twin, dense, linear.bias)
    assert out.shape == want.shape and torch.allclose(out, want, atol=1e-5)
    out.square().sum().backward()
    mine = linear.bias.grad.clone() if bias else None
    linear.zero_grad()
    want.square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-4)
    assert mine is None or torch.allclose(mine, linear.bias.grad, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_activations(dtype):
    linear = layer().to(dtype)
    assert linear.weight.dtype == dtype
    x = torch.randn(4, 128).to(dtype)
    want = functional.linear(x.float(), linear.weight.dequantize(torch.float32), linear.bias.float())
    assert linear(x).dtype == dtype
    assert torch.allclose(linear(x).float(), want, atol=3e-2)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert layer()(torch.randn(2, 128)).dtype == torch.bfloat16


def test_it_is_a_parameter_of_a_plain_linear_layer():
    linear = layer()
    assert type(linear) is nn.Linear
    assert isinstance(linear.weight, nn.Parameter) and isinstance(linear.weight, CompressedWeight)
    assert not linear.weight.requires_grad and linear.weight.shape == (96, 128)
    assert 4.1 < linear.weight.bits_per_weight < 4.14
    assert layer(double_quant=False).weight.bits_per_weight == 4.5
    assert linear.weight.storage_bytes == sum(t.nbytes for t in linear.weight.components().values())


def test_backward_keeps_no_dense_copy():
    linear = layer(512, 512, bias=False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        linear(torch.randn(2, 512, requires_grad=True)).sum()
    assert sum(sizes) < 512 * 512


def test_gradient_checkpointing():
    linear, x = layer(), torch.randn(3, 128, requires_grad=True)
    linear(x).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    checkpoint(linear, again, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_copies_and_moves():
    linear = layer()
    codes = linear.weight.codes
    twin = copy.deepcopy(linear)
    assert isinstance(twin.weight, nn.Parameter) and torch.equal(twin.weight.codes, codes)
    assert twin.weight.codes.data_ptr() != codes.data_ptr()
    assert linear.weight.detach().codes.data_ptr() == codes.data_ptr()
    assert linear.weight.clone().codes.data_ptr() != codes.data_ptr()

    before = linear.weight.dequantize()
    linear.bfloat16().to(torch.float32)
    assert torch.equal(linear.weight.dequantize(), before)
    assert linear.weight.absmax_scales.dtype == torch.float32

    linear.to("meta")
    assert linear.weight.device.type == "meta" and linear.weight.codes.device.type == "meta"


def test_state_dict():
    linear, other = layer(), layer()
    other.weight = nn.Parameter(NF4Weight.quantize(torch.randn(96, 128)), requires_grad=False)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight.dequantize(), linear.weight.dequantize())
    assert other.weight.codes.data_ptr() != linear.weight.codes.data_ptr()
    other.load_state_dict(linear.state_dict(), assign=True)
    assert other.weight.codes.data_ptr() == linear.weight.codes.data_ptr()
    with pytest.raises(RuntimeError, match="double_quant"):
        layer(double_quant=False).load_state_dict(linear.state_dict())
    with pytest.raises(RuntimeError, match="dense tensor"):
        linear.load_state_dict(nn.Linear(128, 96).state_dict())


OPERATIONS = {
    "aten.add": lambda w: w + 1,
    "aten.t": lambda w: w.t(),
    "aten.mm": lambda w: torch.mm(torch.randn(2, 96), w),
    "aten.select": lambda w: w[0],
    "aten.zeros_like": lambda w: torch.zeros_like(w),
    "aten.linalg_vector_norm": lambda w: w.norm(),
    "aten.add_": lambda w: w.add_(1),
    "int": lambda w: w.int(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_other_operation_raises_and_names_itself(name):
    with pytest.raises(UnsupportedOperation, match=name):
        OPERATIONS[name](layer().weight.detach())


def test_wrong_width_of_the_input():
    with pytest.raises(RuntimeError, match="does not fit"):
        layer()(torch.randn(2, 64))


def test_components_and_spec_are_inverse():
    for double_quant in (True, False):
        weight = layer(double_quant=double_quant).weight
        again = CompressedWeight.from_components(weight.spec(), weight.components())
        assert type(again) is NF4Weight and torch.equal(again.dequantize(), weight.dequantize())
    parts = weight.components()
    with pytest.raises(UserError, match=r"absmax: expected float32 \(192,\), got nothing"):
        CompressedWeight.from_components(weight.spec(), {"codes": parts["codes"]})
    with pytest.raises(UserError, match="codes: expected uint8"):
        CompressedWeight.from_components(weight.spec(), parts | {"codes": parts["codes"][1:]})
    with pytest.raises(UserError, match='did you mean "nf4"'):
        CompressedWeight.from_components(weight.spec() | {"kind": "nf"}, parts)


def test_scale_rows():
    weight = layer().weight
    vector = torch.randn(96)
    scaled = weight.scale_rows(vector)
    want = weight.dequantize() * vector[:, None]
    assert torch.equal(scaled.codes, weight.codes) and scaled.codes.data_ptr() != weight.codes.data_ptr()
    assert (scaled.dequantize() - want).abs().max() <= 2e-7 * want.abs().max()
    assert scaled.bits_per_weight == 4.5
    ones = weight.scale_rows(torch.ones(96))
    assert torch.equal(ones.dequantize(), weight.dequantize())
    with pytest.raises(UserError, match="straddle"):
        layer(in_features=100).weight.scale_rows(vector)
    with pytest.raises(UserError, match=r"expected \(96,\)"):
        weight.scale_rows(torch.ones(95))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
    ],
    ids=["lora", "ia3"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "quantizer",
    [
        QUANTIZERS.create("nf4"),
        QUANTIZERS.create("rtn"),
        QUANTIZERS.create("rtn", bits=3, group_size=None, symmetric=True),
    ],
    ids=["nf4", "int4", "int3"],
)
def test_peft_attaches_and_trains_unmodified(tiny_llama, config, checkpointing, quantizer):
    quantize_model(tiny_llama, quantizer, progress=False)
    dense = copy.deepcopy(tiny_llama)
    for module in dense.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, CompressedWeight):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    ids = torch.arange(24).view(2, 12)
    losses = {}
    for name, model in (("ours", tiny_llama), ("dense", dense)):
        torch.manual_seed(1)
        model = get_peft_model(model, config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses[name] = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["dense"], rel=1e-4)


def test_merging_a_peft_adapter_raises_instead_of_going_wrong(tiny_llama):
    quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(UnsupportedOperation):
        model.merge_and_unload()


def test_generation_with_cache_equals_without(tiny_llama):
    quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    ids = torch.arange(5, 15)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = tiny_llama.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, tiny_llama.generate(ids, use_cache=False, **options))


def test_weights_are_freed():
    linear = layer()
    reference = weakref.ref(linear.weight.codes)
    linear(torch.randn(2, 128, requires_grad=True)).sum().backward()
    del linear
    assert reference() is None


@pytest.mark.slow
def test_compile():
    linear = layer()
    compiled = torch.compile(linear, fullgraph=True)
    x = torch.randn(3, 128, requires_grad=True)
    out = compiled(x)
    assert torch.allclose(out, linear(x), atol=1e-6)
    out.sum().backward()
    assert torch.allclose(x.grad, torch.ones(3, 96) @ linear.weight.dequantize(), atol=1e-4)


def test_compile_without_code_generation():
    linear = layer()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 128, requires_grad=True)
    out = compiled(x)
    assert torch.allclose(out, linear(x), atol=1e-6)
    out.sum().backward()
    assert torch.allclose(x.grad, torch.ones(3, 96) @ linear.weight.dequantize(), atol=1e-4)


@pytest.mark.parametrize("rows", [2, 40])
def test_the_output_may_be_changed_in_place(rows):
    """Some adapters add to it where it lies."""
    linear = layer(bias=False)
    x = torch.randn(rows, 3, 128, requires_grad=True)
    out = linear(x)
    out += 1
    out.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    (functional.linear(twin, linear.weight.dequantize()) + 1).square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-4)
