from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.energy import EnergyMeter

CPU = torch.device("cpu")


def package(folder: Path, name: str, joules: float) -> Path:
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text("1000000000\n")
    return path


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        package(tmp_path, name, 100)
    meter = EnergyMeter(CPU, tmp_path)
    package(tmp_path, "intel-rapl:0", 103.5)
    package(tmp_path, "intel-rapl:1", 102)
    package(tmp_path, "intel-rapl:0:0", 900)  # a part of package 0
    assert meter.source == "RAPL" and meter.joules() == pytest.approx(5.5)


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 999)
    meter = EnergyMeter(CPU, tmp_path)
    package(tmp_path, "intel-rapl:0", 3)
    assert meter.joules() == pytest.approx(4)


def test_a_machine_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnergyMeter(CPU, tmp_path).joules() is None
    package(tmp_path, "intel-rapl:0", 1)

    def refused(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.joules() is None and meter.source == ""


def test_a_gpu_by_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([10_000, 10_000, 12_500])
    asked: list[str] = []
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    meter = EnergyMeter(torch.device("cuda", 1))
    assert meter.source == "NVML" and meter.joules() == 2.5 and asked == ["GPU-1-2-3"]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert EnergyMeter(torch.device("cuda", 1)).joules() is None
