"""A step of the pipeline: settings, what must hold before it, what holds after it, and how it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress_peft.adapters import Adapter
from compress_peft.errors import Problem
from compress_peft.registry import Method, Registry

if TYPE_CHECKING:
    from pipelines.plan import ModelShape, StepEstimate
    from pipelines.state import RunState


@dataclass(frozen=True)
class Alternative:
    """A further outcome of a step that is measured beside the main one, e.g. another way of merging."""

    label: str
    backbone: str


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind; paths are relative to the run folder, so that the folder can be moved.

    backbone: folder with the model from here on; None if it did not change.
    adapter: folder with adapter weights that go on top of the backbone; "" removes the one before.
    facts: for the report.
    """

    backbone: str | None = None
    adapter: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    seconds: float = 0.0

    def after(self, seconds: float) -> StepResult:
        """The same result with the time it took."""
        return replace(self, seconds=seconds)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepResult:
        alternatives = tuple(Alternative(**item) for item in values.pop("alternatives"))
        return cls(**values, alternatives=alternatives)


class Step(Method):
    """Base of all steps. States are words such as "quantized", "adapted", "merged", "exported"."""

    step: str
    """The kind of step."""

    needs: ClassVar[dict[str, str]] = {}
    """State that must hold before -> what to do if it does not."""
    forbids: ClassVar[dict[str, str]] = {}
    """State that must not hold before -> why, and what to do."""
    adds: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[str | None] = None
    """The field that takes all keys of the YAML step but `step` itself: the settings of the chosen method."""

    @classmethod
    def added_by(cls, raw: dict[str, Any]) -> frozenset[str]:
        """The states that hold afterwards, given the step as it stands in the YAML."""
        return cls.adds

    def states_added(self) -> frozenset[str]:
        """`added_by` of this step."""
        raw = self.model_dump(mode="json")
        return self.added_by(raw | raw.pop(self.nested) if self.nested is not None else raw)

    def label(self) -> str:
        """The name of the stage that this step leads to, in tables and plots."""
        raise NotImplementedError

    def run(self, state: RunState, folder: Path) -> StepResult:
        """Do the work on `state.model()` and leave everything needed to go on under `folder`."""
        raise NotImplementedError

    def estimate(self, shape: ModelShape) -> StepEstimate:
        """Memory and disk that the step will need, for --dry-run; updates `shape` to what it leaves."""
        raise NotImplementedError

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        """Why this step does not fit the settings of the steps before it, beyond the order of their kinds."""
        return []

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        """Why the step cannot work on a model of this shape; empty if it can."""
        return []

    def shares_work(self) -> bool:
        """Whether processes that were started together each do a part of it; else the first does it alone. If so, `run`
        is called in all of them, and only the first writes."""
        return False

    def leaves_layers(self) -> bool:
        """Whether its `targets` or `skip` leave layers as they are."""
        return False

    def decoder_only(self) -> str:
        """Why it cannot work on an encoder-decoder, and after " -> " what to do instead; empty if it can."""
        return ""

    def requires_data(self) -> str | None:
        """Why the recipe needs a `data` section for this step, or None."""
        return None


STEPS: Registry[Step] = Registry("step", "step")


def dense_problems(adapter: Adapter, earlier: list[Step], where: str) -> list[Problem]:
    """What is wrong with an adapter that needs dense layers after steps that quantize; `where`: its key.

    Whether the right layers were left out shows only when the adapter is attached.
    """
    reason = adapter.needs_dense()
    quantizing = [step for step in earlier if "quantized" in step.states_added()]
    if not reason or not quantizing:
        return []
    if not adapter.own_layers_dense:
        fix = "use another adapter, or leave out the quantize step"
        return [Problem(where, f"{reason}, and the backbone is quantized before", fix)]
    if all(step.leaves_layers() for step in quantizing):
        return []
    fix = 'leave the layers that it trains out of the quantize step, e.g. skip: ["*.layers.29.*"]'
    return [Problem(where, f"{reason}, and all layers are quantized before", fix)]


def check_order(steps: list[Any]) -> list[Problem]:
    """Problems of the order of steps as they stand in the YAML; an unknown step ends the check."""
    states: frozenset[str] = frozenset()
    problems = []
    for index, raw in enumerate(steps):
        kind = raw.get("step") if isinstance(raw, dict) else None
        if kind not in list(STEPS):
            break
        cls = STEPS[kind]
        where = f"steps[{index}]"
        for state, fix in cls.needs.items():
            if state not in states:
                problems.append(Problem(where, f'"{kind}" needs a model that is {state}', fix))
        for state, reason in cls.forbids.items():
            if state in states:
                what, _, fix = reason.partition(" -> ")
                problems.append(Problem(where, f'"{kind}" cannot follow here: {what}', fix))
        states = (states | cls.added_by(raw)) - cls.removes
    return problems
