"""Products of compressed weights on a CUDA device beside the dense product: microseconds by rows of activations.

    python -m benchmarks.kernels_cuda [--shape 4096x11008] [--rows 1 4 16 512] [--dtype bfloat16]

Weights are random, several copies of each are multiplied in turn so that none stays in the cache, and times are those
of CUDA events around 50 calls, the median of 7. "enqueued" is what Python takes to start one call: below it a kernel
cannot show what it is worth unless the calls are recorded as a CUDA graph. "chosen": what `Fastest` took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress_peft.quantization import QUANTIZERS
from compress_peft.weights import kernels
from compress_peft.weights.compressed import dtype_from_name

WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 g64": ("rtn", {"bits": 8, "group_size": 64}),
    "int4 g64": ("rtn", {"bits": 4, "group_size": 64}),
    "int4 g128 sym": ("rtn", {"bits": 4, "group_size": 128, "symmetric": True}),
    "int3 g64": ("rtn", {"bits": 3, "group_size": 64}),
    "int2 g64": ("rtn", {"bits": 2, "group_size": 64}),
    "nf4": ("nf4", {"block_size": 64}),
}
CALLS, REPEATS, CACHE = 50, 7, 256e6


def seconds(x: Tensor, weights: list[Tensor]) -> tuple[float, float]:
    """(on the device, in Python) of one product."""
    for weight in weights:
        functional.linear(x, weight)
    device, python = [], []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        for call in range(CALLS):
            functional.linear(x, weights[call % len(weights)])
        end.record()
        python.append((time.perf_counter() - begin) / CALLS)
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(device), statistics.median(python)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x11008", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    rows, columns = map(int, arguments.shape.split("x"))
    dtype = dtype_from_name(arguments.dtype)
    print(f"{torch.cuda.get_device_name()}; {kernels.active('cuda')}; {rows} x {columns} {arguments.dtype}")
    dense = torch.randn(rows, columns, device="cuda", dtype=dtype)
    copies = max(2, int(CACHE / (dense.numel() * dense.element_size())) + 1)
    table: dict[str, list[Tensor]] = {"dense": [dense.clone() for _ in range(copies)]}
    for name, (method, settings) in WEIGHTS.items():
        quantizer = QUANTIZERS.create(method, **settings)
        size = int(CACHE / (dense.numel() / 2)) + 2
        table[name] = [quantizer.quantize(dense) for _ in range(size)]
    for count in arguments.rows:
        x = torch.randn(count, columns, device="cuda", dtype=dtype)
        found = {name: seconds(x, weights) for name, weights in table.items()}
        base = found["dense"][0]
        for name, (device, python) in found.items():
            print(
                f"  {count:4} rows  {name:14} {device * 1e6:9.1f} us  dense / this {base / device:5.2f}"
                f"  enqueued in {python * 1e6:6.1f} us"
            )
    for key, choice in kernels._fastest.chosen.items():
        print(f"chosen: {key}: {choice}")


if __name__ == "__main__":
    main()
