"""What the measurements were taken on."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from eval.records import Machine

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "lm-eval")
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "asimd", "sve", "bf16")


def describe_machine(measure_bandwidth: bool = True) -> Machine:
    """Processor, memory, system, package versions; takes about half a second with the bandwidth."""
    cpu, features = _cpu()
    versions = {}
    for package in ("compress-peft", *PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # optional, or run from the source tree
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    logical = os.cpu_count() or 1
    return Machine(
        cpu=cpu,
        cpu_features=features,
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        threads=torch.get_num_threads(),
        ram_bytes=psutil.virtual_memory().total,
        os=platform.platform(),
        python=platform.python_version(),
        versions=versions,
        gpus=tuple(gpus),
        read_bandwidth=read_bandwidth() if measure_bandwidth else None,
    )


def read_bandwidth(megabytes: int = 256, repeats: int = 5, device: torch.device | None = None) -> float:
    """Bytes per second at which the device reads an array much larger than the caches (best of repeats); on a CPU with
    torch's threads."""
    array = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        array.sum().item()
        best = min(best, time.perf_counter() - start)
    return array.numel() * 4 / best


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets; the latter only where /proc tells them."""
    info = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), set[str]()
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
                break
    return name, tuple(feature for feature in FEATURES if feature in flags)
