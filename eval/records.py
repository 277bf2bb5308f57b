"""What is measured and what a run leaves behind: the schema of report.json.

All records are frozen and survive a JSON round trip. Sizes are bytes, times seconds, shares between 0 and 1,
unless the field says otherwise. `RunReport` is the only source of report.md and report.html.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import model_validator

from eval.costs import Latency, Memory, Storage
from eval.record import Record

SCHEMA_VERSION: Literal[2] = 2


class Accuracy(Record):
    """Share of examples answered correctly."""

    metric: str
    """What counts as the answer, e.g. "choice" (most likely candidate) or "choice per token"."""
    task: str = ""
    """Name of the data, e.g. "bbc topics, test"."""
    n: int
    """Number of examples."""
    correct: int
    value: float
    low: float
    """Lower end of the Wilson score interval."""
    high: float
    confidence: float = 0.95
    predictions: tuple[str, ...]
    """The answer given to each example, in the order of the data."""
    references: tuple[str, ...]
    hits: tuple[bool, ...]
    """Whether each prediction counts as correct."""

    @classmethod
    def from_answers(
        cls,
        metric: str,
        predictions: list[str],
        references: list[str],
        task: str = "",
        hits: list[bool] | None = None,
    ) -> Accuracy:
        """Counts and interval; an answer is right where it equals its reference, unless `hits` is given.

        Raises:
            ValueError: no examples, or lists of different lengths.
        """
        from scipy.stats import binomtest

        if not references or len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references: need equal, > 0")
        if hits is None:
            hits = [given == wanted for given, wanted in zip(predictions, references, strict=True)]
        correct = sum(hits)
        interval = binomtest(correct, len(hits)).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(
            metric=metric,
            task=task,
            n=len(hits),
            correct=correct,
            value=correct / len(hits),
            low=float(interval.low),
            high=float(interval.high),
            predictions=tuple(predictions),
            references=tuple(references),
            hits=tuple(hits),
        )


class TextScore(Record):
    """A graded score of generated text, e.g. BLEU-4 or ROUGE-L."""

    metric: str
    task: str = ""
    n: int
    """Number of examples."""
    value: float
    low: float
    """Lower end of the bootstrap interval over examples."""
    high: float
    confidence: float = 0.95
    scores: tuple[float, ...]
    """Of each example; for BLEU the sentence scores, whose mean is not the corpus score."""
    protocol: str
    references_sha256: str
    """Checksum of the references: two figures compare only where it is equal."""
    share: bool = True
    """Whether the score lies between 0 and 1; False for CIDEr and for a judge's grades, which are shown as they are."""


class Judgement(Record):
    """What a language model said of one generated answer."""

    answer: str
    reply: str
    """The judge's whole text."""
    grade: float | None
    """From 1 to 10; None where the reply holds none, and then no part of the mean."""
    turn: int = 1
    """Of the dialogue."""


class Perplexity(Record):
    """exp(mean negative log-likelihood) of held-out text in independent blocks."""

    value: float
    low: float
    """Lower end of a t-interval over the blocks' mean log-likelihoods."""
    high: float
    confidence: float = 0.95
    tokens: int
    """Number of predicted tokens."""
    block_size: int
    block_nll: tuple[float, ...]
    """Mean negative log-likelihood of each block, in nats per token."""
    protocol: str
    text_sha256: str
    """Checksum of the token ids: two figures compare only where it is equal."""


class AnswerLoss(Record):
    """Mean negative log-likelihood of the right answers given their prompts, in nats a token: what stands in the place
    of perplexity where the model does not continue text (encoder-decoders)."""

    value: float
    low: float
    """Lower end of an interval over the examples."""
    high: float
    confidence: float = 0.95
    examples: int
    tokens: int
    """Of the answers, with the end of text that closes each."""


class Fidelity(Record):
    """How close the model's answers are to those of the original model, on the same text."""

    kl: float
    """KL(original || stage), nats a token, over the whole vocabulary."""
    low: float
    """Lower end of a t-interval over the blocks."""
    high: float
    confidence: float = 0.95
    block_kl: tuple[float, ...]
    token_agreement: float
    """Share of positions where both find the same token most likely, the text before being the same."""
    tokens: int
    """Number of positions."""
    continued: float
    """Of greedy continuations, the share of new tokens before the first one that differs."""
    prompts: int
    new_tokens: int
    protocol: str
    text_sha256: str
    """Checksum of the token ids: two figures compare only where it is equal."""


class HarnessScore(Record):
    """One metric of one task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    """As the harness gives it; None where it has none."""
    n: int | None = None
    num_fewshot: int | None = None
    version: str = ""
    """Of the task."""


class StageRecord(Record):
    """All measurements of the model at one point of the run; None or empty: not measured there."""

    name: str
    """e.g. "original", "compressed", "fine-tuned", "merged (bundle)", "exported"."""
    accuracies: tuple[Accuracy, ...] = ()
    """The first one is the run's main metric."""
    texts: tuple[TextScore, ...] = ()
    """Graded scores of generated answers."""
    judgements: tuple[Judgement, ...] = ()
    """A judge's word on each answer, in the order of the test split and of the turns of each example."""
    perplexity: Perplexity | None = None
    answer_loss: AnswerLoss | None = None
    fidelity: Fidelity | None = None
    """Against the original model."""
    harness: tuple[HarnessScore, ...] = ()
    storage: Storage | None = None
    memory: Memory | None = None
    latency: Latency | None = None
    seconds: float = 0.0
    """What the measurement took."""
    details: dict[str, Any] = {}
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> Accuracy | None:
        return self.accuracies[0] if self.accuracies else None


class CurvePoint(Record):
    step: int
    value: float


class Curve(Record):
    """A quantity over the optimizer's steps."""

    name: str
    """Legend, e.g. "training" or "validation"."""
    metric: str = "loss"
    points: tuple[CurvePoint, ...]


class StepRecord(Record):
    """One step of the pipeline."""

    name: str
    seconds: float
    details: dict[str, Any] = {}
    resumed: bool = False
    """True where the result was taken from an earlier, interrupted run."""


class SplitFacts(Record):
    name: str
    size: int
    sha256: str


class DataFacts(Record):
    name: str
    source: str = ""
    licence: str = ""
    splits: tuple[SplitFacts, ...] = ()
    details: dict[str, Any] = {}


class ModelFacts(Record):
    name: str
    source: str = ""
    architecture: str = ""
    parameters: int = 0
    details: dict[str, Any] = {}


class Machine(Record):
    cpu: str
    cpu_features: tuple[str, ...] = ()
    """Instruction sets that matter for matrix products, e.g. "avx2"."""
    physical_cores: int
    logical_cores: int
    threads: int
    """Threads that torch uses."""
    ram_bytes: int
    os: str
    python: str
    versions: dict[str, str] = {}
    gpus: tuple[str, ...] = ()
    read_bandwidth: float | None = None
    """Bytes per second, best of a few reads of a large array; None where it was not measured."""


class RunReport(Record):
    """Everything known about one run, enough to repeat it."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    title: str = ""
    started: datetime
    finished: datetime
    command: str
    """The command line that repeats the run."""
    recipe: dict[str, Any]
    """The resolved recipe, defaults included."""
    seed: int
    machine: Machine
    model: ModelFacts
    data: tuple[DataFacts, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    curves: tuple[Curve, ...] = ()
    stages: tuple[StageRecord, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _unique_stages(self) -> RunReport:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        return self
