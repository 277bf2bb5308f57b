"""What a model costs: bytes, peak memory, time and energy. Part of the schema of report.json (eval/records.py)."""

from __future__ import annotations

import statistics

from eval.record import Record


class Storage(Record):
    """Where the bytes are; a tensor that is shared (a tied head) counts once."""

    codes: int = 0
    scales: int = 0
    dense_linear: int = 0
    embeddings: int = 0
    """Token embeddings and the output head."""
    adapter: int = 0
    other: int = 0
    """Norms, biases outside linear layers, buffers."""
    parameters: int = 0
    """Logical number of backbone weights (a 4-bit weight counts as one)."""
    adapter_parameters: int = 0
    quantized_layers: int = 0
    bits_per_weight: float | None = None
    """All storage of the quantized linear layers over their number of weights; None where there are none."""
    sparsity: float | None = None
    """Share of zeros among the weights of the pruned layers; None for a model that was not pruned."""
    disk_bytes: int | None = None
    """All files of the folder; None where the stage was not saved."""

    @property
    def memory_bytes(self) -> int:
        return self.codes + self.scales + self.dense_linear + self.embeddings + self.adapter + self.other


class MemoryEstimate(Record):
    """What a model should take, worked out from its structure by `eval.memory`. All in bytes."""

    baseline_bytes: int = 0
    """Python with its libraries."""
    weights_bytes: int
    load_peak_bytes: int
    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    """Activations, kept for the backward pass or passing through, with logits and buffers."""
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    peak_bytes: int
    """While it runs or trains, of the whole process."""


class Memory(Record):
    """Peak memory in a fresh process that only loads and runs the model."""

    baseline_bytes: int
    """After the imports, before the model."""
    load_peak_bytes: int
    run_peak_bytes: int
    """During prefill and decoding, after loading."""
    kv_cache_bytes: int = 0
    """Keys and values at the end of the generation."""
    estimate: MemoryEstimate | None = None
    """Worked out from the structure of the model, to compare with."""
    method: str
    """Where the figures come from: VmHWM, sampled resident set, or the CUDA allocator."""


class Timing(Record):
    """Repeated measurement of one quantity; the unit stands in the field that holds it."""

    values: tuple[float, ...]
    median: float
    min: float
    max: float

    @classmethod
    def from_values(cls, values: list[float]) -> Timing:
        return cls(values=tuple(values), median=statistics.median(values), min=min(values), max=max(values))


class LatencyPoint(Record):
    """Speed at another batch size, prompt length or number of beams; threads, new tokens and repeats as beside it."""

    batch: int
    prompt_tokens: int
    beams: int
    prefill_seconds: Timing
    decode_tokens_per_second: Timing
    """New tokens of all rows together per second; of several beams the best one counts."""


class Latency(Record):
    """Speed of greedy decoding through the key/value cache, in a fresh process, after a warm-up."""

    prefill_seconds: Timing
    """Time to process the prompt and choose the first token."""
    decode_tokens_per_second: Timing
    """New tokens of all rows together per second, prefill not counted."""
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    device: str
    dtype: str
    load_seconds: float = 0.0
    bytes_per_step: int | None = None
    """What one decoding step of all rows has to read: weights, keys and values."""
    read_bandwidth: float | None = None
    """Bytes per second at which the device reads memory, measured right after the timing."""
    other_load: float | None = None
    """Share of all processors' time that other processes used meanwhile."""
    joules_per_token: float | None = None
    """Of a whole request, prompt included, by new token; the device's idle consumption counts."""
    energy_source: str = ""
    grid: tuple[LatencyPoint, ...] = ()

    @property
    def token_seconds(self) -> float:
        """Between two tokens of a row."""
        return self.batch / self.decode_tokens_per_second.median

    @property
    def bandwidth_share(self) -> float | None:
        """Of the memory bandwidth, reached while decoding: the distance from the roof that memory sets."""
        if self.bytes_per_step is None or not self.read_bandwidth:
            return None
        return self.bytes_per_step / self.token_seconds / self.read_bandwidth
