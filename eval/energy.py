"""Energy, where the machine tells: the processor package's counters (RAPL), and the GPU's own (NVML)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")
"""Linux: a folder intel-rapl:N for each processor package, of AMD's too; often readable by root alone."""


class EnergyMeter:
    """Joules of all that the device does from now on, its idle consumption and that of other processes included.

    source: "RAPL" or "NVML"; "" where the machine does not tell, as most virtual ones.
    """

    def __init__(self, device: torch.device, folder: Path = RAPL):
        self._packages: list[Path] = []
        self._gpu: tuple[Any, Any] | None = None
        self.source = ""
        if device.type == "cuda":
            self._gpu = _nvml(device)
            self.source = "NVML" if self._gpu is not None else ""
        elif device.type == "cpu":
            self._packages = [path for path in sorted(folder.glob("*-rapl:*")) if path.name.count(":") == 1]
            try:
                self._counts()
            except (OSError, ValueError):
                self._packages = []
            self.source = "RAPL" if self._packages else ""
        self._start = self._counts()

    def joules(self) -> float | None:
        """Since the start; None where the machine does not tell. A counter may wrap around once."""
        if not self.source:
            return None
        total = 0.0
        for index, (now, then) in enumerate(zip(self._counts(), self._start, strict=True)):
            if now < then and self._packages:
                now += int((self._packages[index] / "max_energy_range_uj").read_text()) / 1e6
            total += now - then
        return total

    def _counts(self) -> list[float]:
        if self._gpu is not None:
            library, handle = self._gpu
            return [library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3]
        return [int((path / "energy_uj").read_text()) / 1e6 for path in self._packages]


def _nvml(device: torch.device) -> tuple[Any, Any] | None:
    """NVIDIA's library and this device's handle; None where the package nvidia-ml-py or the counter is missing."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:
        return None
    return pynvml, handle
