"""A walk that several processes share, against the same walk of one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress_peft.errors import ConfigError
from compress_peft.models.layers import linear_layers
from compress_peft.models.processes import Processes, alone, current, join, leave
from compress_peft.models.save import save_model
from compress_peft.models.walk import BlockWalk
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.quantization import QUANTIZERS, quantize_folder, quantize_model
from compress_peft.weights.storage import split_state_dict
from tests.conftest import build_tiny_llama
from tests.models.test_walk import build

pytestmark = pytest.mark.process

COUNT = 3
SAMPLES = torch.randint(3, 64, (7, 12), generator=torch.Generator().manual_seed(3))  # 3, 2 and 2 of them
METHODS = {name: {} for name in ("rtn", "nf4", "gptq", "gptaq", "awq")} | {"mixed": {"budget": "4.5 bits"}}
PRUNING = {"wanda": {}, "sparsegpt": {}, "ria": {"allocation": "owl", "sparsity": 0.7}}


def statistics(kind: str, processes: Processes) -> dict[str, dict[str, Any]]:
    model = build(kind)
    walk = BlockWalk(model, SAMPLES, dict(linear_layers(model)), False, ("hessian", "drift"), processes=processes)
    found = {}
    for turn in walk:
        for name, stats in turn.statistics.items():
            found[name] = {key: getattr(stats, key) for key in ("hessian", "drift", "sum", "square_sum", "tokens")}
        for layer in turn.layers.values():
            layer.weight.data.mul_(0.9)  # so that the inputs of later blocks drift
    return found


def quantized(method: str) -> tuple[dict[str, Tensor], list[float]]:
    model = build_tiny_llama()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    first.self_attn.k_proj.weight = first.self_attn.v_proj.weight
    quantizer = QUANTIZERS.create(method, **METHODS[method])
    summary = quantize_model(model, quantizer, SAMPLES if quantizer.needs else None, progress=False)
    return split_state_dict(model)[0], [layer.relative_error for layer in summary.layers]


def quantized_as_saved() -> dict[str, Tensor]:
    model = build_tiny_llama()
    quantize_model(model, QUANTIZERS.create("gptq"), SAMPLES, progress=False)
    return split_state_dict(model)[0]


def pruned(method: str) -> dict[str, Tensor]:
    model = build_tiny_llama()
    prune_model(model, PRUNERS.create(method, **PRUNING[method]), SAMPLES, progress=False)
    return model.state_dict()


def refusal(samples: Tensor, method: str) -> str:
    with pytest.raises(ConfigError) as caught:
        if method in list(PRUNERS):
            prune_model(build_tiny_llama(), PRUNERS.create(method), samples, progress=False)
        else:
            quantize_model(build_tiny_llama(), QUANTIZERS.create(method), samples, progress=False)
    return str(caught.value)


def work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(COUNT)}
    processes = join()
    found: dict[str, Any] = {"processes": (processes.rank, processes.count, processes.on_machine)}
    for kind in ("llama", "mixtral"):
        found[kind] = statistics(kind, processes)
    for method in METHODS:
        found[method] = quantized(method)
    for method in PRUNING:
        found[method] = pruned(method)
    options: dict[str, Any] = {"progress": False, "activation_bytes": 2000}  # some of them on disk
    found["untied"] = quantized_as_saved()
    quantize_folder(folder / "model", folder / "gptq", QUANTIZERS.create("gptq"), SAMPLES, **options)
    found["there"] = (folder / "gptq").exists()
    for method in ("autoround", "wanda++"):
        found[method] = refusal(SAMPLES, method)
    found["few"] = refusal(SAMPLES[:2], "gptq")
    with alone():
        found["alone"] = current()
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once for all workers of the test run."""
    folder = tmp_path_factory.getbasetemp().parent / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            save_model(build_tiny_llama(), folder / "model")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            torch.multiprocessing.spawn(work, (port, folder), nprocs=COUNT)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process had."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def test_processes_know_each_other(found: list[dict[str, Any]]) -> None:
    assert [each["processes"] for each in found] == [(rank, COUNT, COUNT) for rank in range(COUNT)]
    assert all(each["alone"] == Processes() for each in found)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # of experts, some see tokens in one process alone
def test_statistics_are_those_of_all_samples(kind: str, found: list[dict[str, Any]]) -> None:
    want = statistics(kind, Processes())
    for each in found:
        assert list(each[kind]) == list(want) or kind == "mixtral"
        assert each[kind].keys() == want.keys()
        for name, stats in each[kind].items():
            assert stats["tokens"] == want[name]["tokens"]
            for key in ("hessian", "drift", "sum", "square_sum"):
                scale = want[name][key].abs().max()
                assert (stats[key] - want[name][key]).abs().max() <= 1e-4 * scale + 1e-6, (name, key)
                assert torch.equal(stats[key], found[0][kind][name][key])


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_quantize_to_the_same_bytes(method: str, found: list[dict[str, Any]]) -> None:
    tensors, errors = found[0][method]
    for each in found[1:]:
        assert all(torch.equal(tensor, each[method][0][key]) for key, tensor in tensors.items())
        assert each[method][1] == errors
    alone_tensors, alone_errors = quantized(method)
    assert tensors.keys() == alone_tensors.keys()
    for key, tensor in tensors.items():
        want = alone_tensors[key]
        if method in ("rtn", "nf4"):
            assert torch.equal(tensor, want), key
        elif tensor.dtype == torch.uint8:  # sums in another order, and codes that hang on their last bits
            assert float((tensor == want).float().mean()) > 0.9, key
        else:
            torch.testing.assert_close(tensor, want, rtol=1e-2, atol=1e-3)
    assert errors == pytest.approx(alone_errors, rel=1e-2)


@pytest.mark.parametrize("method", PRUNING)
def test_all_processes_prune_alike(method: str, found: list[dict[str, Any]]) -> None:
    want = pruned(method)
    for each in found:
        assert all(torch.equal(tensor, found[0][method][key]) for key, tensor in each[method].items())
        for key, tensor in each[method].items():
            assert float(((tensor == 0) == (want[key] == 0)).float().mean()) > 0.995
    assert any(bool((tensor == 0).any()) for tensor in want.values())


def test_the_folder_has_what_memory_has(folder: Path, found: list[dict[str, Any]]) -> None:
    tensors, _ = split_state_dict(AutoModelForCausalLM.from_pretrained(folder / "gptq"))
    assert all(torch.equal(tensor, found[0]["untied"][key]) for key, tensor in tensors.items())
    assert all(each["there"] for each in found)
    assert not list(folder.glob(".gptq.partial"))


def test_refusals_name_the_way_out(found: list[dict[str, Any]]) -> None:
    for each in found:
        for method in ("autoround", "wanda++"):
            assert f"{COUNT} processes have parts" in each[method] and "one process" in each[method]
        assert f"2 samples are too few for {COUNT} processes" in each["few"]
