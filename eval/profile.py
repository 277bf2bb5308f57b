"""Memory and speed of a saved model, measured in a fresh process.

    python -m eval.profile --model FOLDER --json OUT [--device cpu --dtype auto --prompt-tokens 128 ...]
    python -m eval.profile --model FOLDER --batches 1 4 16 --prompts 128 1024 --beams 1 3

The process imports the libraries (baseline), loads the folder (peak at load), warms up, then repeats prefill and
greedy decoding of a fixed number of tokens through the key/value cache (peak at run). On Linux the kernel's
high-water mark of the resident set is reset between phases; elsewhere a thread samples the resident set. On CUDA
the allocator's statistics are used. Loading ends when every weight has been read once: a memory-mapped checkpoint is
otherwise brought in by the first run, and would look as if it needed no memory to load. With --batches, --prompts or
--beams every combination of them is timed after that (eval/latency.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from compress_peft.errors import MissingRequirement, ModelError, Problem, UserError
from eval.costs import Latency, Memory
from eval.record import Record

USER_ERROR = 2


class ProfileSettings(Record):
    """What one profile runs."""

    device: str = "cpu"
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16", of activations and uncompressed weights."""
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=24, ge=2)
    """The first one comes out of the prefill, so that decoding is timed over one less."""
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=3, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch; None leaves its default."""
    batches: tuple[PositiveInt, ...] = ()
    """Batch sizes of further timings; every combination with `prompts` and `beams` is timed."""
    prompts: tuple[PositiveInt, ...] = ()
    """Prompt lengths of further timings."""
    beams: tuple[PositiveInt, ...] = ()
    """Beams of further timings."""
    trust_remote_code: bool = False
    timeout_seconds: float = 1800.0


class ProfileResult(Record):
    memory: Memory
    latency: Latency


class _ProfileFailure(Record):
    """What the child hands over when the user has to act: (where, what, fix) of each problem."""

    problems: tuple[tuple[str, str, str], ...]


def profile_folder(
    folder: str | Path, settings: ProfileSettings | None = None, adapter: str | Path | None = None
) -> tuple[Memory, Latency]:
    """Runs `python -m eval.profile` on a folder and returns what it measured.

    adapter: folder of an adapter to attach to the model.

    Raises:
        ModelError: the child refused the model; its problems are passed on.
        MissingRequirement: the child was killed (out of memory), or took longer than the settings allow.
        RuntimeError: the child crashed; the end of its error output is in the message.
    """
    settings = settings or ProfileSettings()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "profile.json"
        command = [sys.executable, "-m", "eval.profile", "--model", str(folder), "--json", str(result)]
        if adapter is not None:
            command += ["--adapter", str(adapter)]
        for field, value in settings.model_dump(exclude={"timeout_seconds"}).items():
            option = "--" + field.replace("_", "-")
            if value is True:
                command.append(option)
            elif isinstance(value, tuple):
                command += [option, *map(str, value)] if value else []
            elif value is not None and value is not False:
                command += [option, str(value)]
        search = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=settings.timeout_seconds, env=environment
            )
        except subprocess.TimeoutExpired as error:
            what = f"loading and running it took longer than {settings.timeout_seconds:.0f} s"
            fix = "profile fewer tokens or repeats, or allow more time"
            raise MissingRequirement(Problem(str(folder), what, fix)) from error
        if done.returncode == USER_ERROR and result.exists():
            failure = _ProfileFailure.model_validate_json(result.read_text())
            raise ModelError(Problem(*problem) for problem in failure.problems)
        if done.returncode < 0:
            what = f"the process that measures it was killed by signal {-done.returncode}, likely for want of memory"
            fix = "close other programs, or use a smaller model, batch or prompt"
            raise MissingRequirement(Problem(str(folder), what, fix))
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-25:])
            raise RuntimeError(f"profiling {folder} failed with exit code {done.returncode}:\n{tail}")
        measured = ProfileResult.model_validate_json(result.read_text())
    return measured.memory, measured.latency


def main(argv: list[str] | None = None) -> int:
    """Command line of the child; 0 done, 2 the user has to act."""
    parser = argparse.ArgumentParser(prog="python -m eval.profile", description="Memory and speed of a saved model.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--adapter", help="folder of an adapter to attach")
    parser.add_argument("--json", help="file for the result; printed where it is not given")
    defaults = ProfileSettings()
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--dtype", default=defaults.dtype, choices=("auto", "float32", "bfloat16", "float16"))
    for name in ("prompt_tokens", "new_tokens", "batch", "repeats"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(defaults, name))
    for name in ("batches", "prompts", "beams"):
        parser.add_argument("--" + name, type=int, nargs="+", default=(), help="of further timings")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    given = vars(parser.parse_args(argv))
    folder, target, adapter = given.pop("model"), given.pop("json"), given.pop("adapter")
    try:
        settings = ProfileSettings(**given)
    except ValidationError as error:
        parser.error(str(error))
    try:
        text = measure(folder, settings, adapter).model_dump_json(indent=1)
        code = 0
    except UserError as error:
        problems = tuple((p.where, p.what, p.fix) for p in error.problems)
        text, code = _ProfileFailure(problems=problems).model_dump_json(), USER_ERROR
        print(error, file=sys.stderr)
    if target:
        Path(target).write_text(text)
    elif code == 0:
        print(text)
    return code


def measure(folder: str, settings: ProfileSettings, adapter: str | None = None) -> ProfileResult:
    """The measurement itself, in this process: call it in a fresh one.

    Raises:
        UserError: the folder cannot be loaded, or the model has too few positions.
    """
    import torch

    from compress_peft.loading import load  # its imports belong to the baseline
    from eval.latency import time_model
    from eval.memory import process_baseline

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    gauge = Gauge(device)
    process_baseline()
    baseline = gauge.restart()
    start = time.perf_counter()
    model, _ = load(
        folder,
        device=device,
        dtype=settings.dtype,
        adapter=adapter,
        trust_remote_code=settings.trust_remote_code,
    )
    _touch(model)
    load_seconds = time.perf_counter() - start
    load_peak = gauge.peak()
    limit = getattr(model.config, "max_position_embeddings", None)
    total = max(settings.prompt_tokens, *settings.prompts, 0) + settings.new_tokens
    if limit is not None and total > limit:
        what = f"{total} tokens (prompt and new ones) exceed the model's {limit} positions"
        raise ModelError(Problem("profile", what, "lower prompt_tokens or new_tokens"))
    gauge.restart()
    latency, cache_bytes, peak = time_model(model, settings, gauge.peak)
    gauge.close()
    memory = Memory(
        baseline_bytes=baseline,
        load_peak_bytes=load_peak,
        run_peak_bytes=peak,
        kv_cache_bytes=cache_bytes,
        method=gauge.method,
    )
    return ProfileResult(memory=memory, latency=latency.model_copy(update={"load_seconds": load_seconds}))


def _touch(model: Any) -> None:
    """Reads one element of every page of every weight."""
    from compress_peft.weights.compressed import CompressedWeight

    for weight in [*model.parameters(), *model.buffers()]:
        parts = weight.components().values() if isinstance(weight, CompressedWeight) else [weight.data]
        for part in parts:
            if part.device.type == "cpu":
                part.flatten()[:: 4096 // part.element_size()].sum()


class Gauge:
    """Peak memory since the last restart, in bytes."""

    def __init__(self, device: Any):
        import psutil
        import torch

        self._device = device
        self._process = psutil.Process()
        self._sampled = 0
        self._stop: threading.Event | None = None
        if device.type == "cuda":
            self._read, self.method = lambda: torch.cuda.max_memory_allocated(device), "CUDA allocator"
        elif self._can_reset_high_water():
            self._read, self.method = _high_water, "VmHWM"
        else:
            self._read, self.method = lambda: max(self._sampled, self._process.memory_info().rss), "sampled RSS"
            self._stop = threading.Event()
            threading.Thread(target=self._sample, args=(self._stop,), daemon=True).start()

    def restart(self) -> int:
        """Forgets the peak; returns what is in use now."""
        import torch

        if self.method == "CUDA allocator":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        if self.method == "VmHWM":
            self._reset_high_water()
        self._sampled = 0
        return self._process.memory_info().rss

    def peak(self) -> int:
        return self._read()

    def close(self) -> None:
        if self._stop is not None:
            self._stop.set()

    @staticmethod
    def _reset_high_water() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _can_reset_high_water(self) -> bool:
        """Some containers accept the request and do nothing: try it on 64 MiB."""
        if not Path("/proc/self/status").exists():
            return False
        block = b"\1" * 2**26
        before = _high_water()
        del block
        return self._reset_high_water() and _high_water() < before - 2**25

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(0.005):
            self._sampled = max(self._sampled, self._process.memory_info().rss)


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
