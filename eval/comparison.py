"""Several runs side by side: one table, tests against a reference, and the fronts of the best trade-offs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_peft.errors import ConfigError, DataError, Problem, did_you_mean
from eval.columns import (
    NOT_MEASURED,
    Column,
    Row,
    accuracy_change,
    accuracy_text,
    harness_text,
    known_columns,
    perplexity_change,
    table_rows,
)
from eval.records import RunReport, StageRecord
from eval.reports import read_report
from eval.significance import compare_accuracy

ORIGINAL = "original"


@dataclass(frozen=True)
class Entry:
    """One stage of one run."""

    name: str
    stage: StageRecord
    report: RunReport


@dataclass(frozen=True)
class Test:
    """A row against the reference."""

    name: str
    accuracy: str
    adjusted: str
    """Benjamini-Hochberg's adjusted p of the accuracies, over all rows."""
    perplexity: str


@dataclass(frozen=True)
class Comparison:
    entries: tuple[Entry, ...]
    reference: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    tests: tuple[Test, ...]
    scores: tuple[tuple[str, str, str], ...]
    """Further scores: row, metric, value with interval."""
    differing: tuple[str, ...]
    """Keys of the recipes that differ between the runs."""
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    """Run, and its values of these keys."""
    warnings: tuple[str, ...]

    @property
    def runs(self) -> int:
        return len({id(entry.report) for entry in self.entries})

    @property
    def test_rows(self) -> list[tuple[str, ...]]:
        return [(test.name, test.accuracy, test.adjusted, test.perplexity) for test in self.tests]

    @property
    def setting_labels(self) -> list[str]:
        return ["Setting", *(name for name, _ in self.settings)]

    @property
    def setting_rows(self) -> list[tuple[str, ...]]:
        """A row a key: runs with other steps differ in many keys, and are few."""
        return [(key, *(values[place] for _, values in self.settings)) for place, key in enumerate(self.differing)]

    def values(self) -> list[dict[str, Any]]:
        """The figures as plain numbers, a row a stage, for CSV and JSON."""
        return [
            {
                "name": entry.name,
                "run": entry.report.name,
                "stage": entry.stage.name,
                **{column.label: column.value(entry.stage) for column in self.columns},
            }
            for entry in self.entries
        ]


def read_runs(folders: Sequence[Path]) -> list[RunReport]:
    """The reports of finished runs; all unreadable ones are told at once.

    Raises:
        DataError: folders without a report, or the same folder twice.
    """
    problems, reports = [], []
    for folder in folders:
        try:
            reports.append(read_report(folder))
        except DataError as error:
            problems += error.problems
    if len({folder.resolve() for folder in folders}) < len(folders):
        problems.append(Problem("RUN", "the same folder is given twice", "give each run once"))
    if problems:
        raise DataError(problems)
    return reports


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Short names of the folders: as many of the last parts of their paths as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-count:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("read_runs refuses the same folder twice")


def compare_runs(
    reports: Sequence[RunReport],
    labels: Sequence[str],
    *,
    stages: str = "last",
    against: str | None = None,
) -> Comparison:
    """The comparison of these runs.

    labels: what each run is called, all different. stages: "last" (each run's last one, and the original model once),
    "all", or the name of a stage. against: the row that the others are tested against; default: the first.

    Raises:
        ConfigError: no run has such a stage, or there is no such row.
    """
    entries = _entries(reports, labels, stages)
    names = [entry.name for entry in entries]
    reference = against or names[0]
    if reference not in names:
        raise ConfigError(Problem("--against", f'no row is called "{reference}"', did_you_mean(reference, names)))
    place = names.index(reference)
    entries = [entries[place], *entries[:place], *entries[place + 1 :]]
    measured = [entry.stage for entry in entries]
    columns = known_columns(measured)
    differing = _differing([report.recipe for report in reports])
    flat = [_flatten(report.recipe) for report in reports]
    return Comparison(
        entries=tuple(entries),
        reference=reference,
        columns=tuple(columns),
        rows=table_rows([entry.name for entry in entries], measured, columns),
        tests=_tests(entries),
        scores=tuple(
            (entry.name, score.metric, accuracy_text(score))
            for entry in entries
            for score in entry.stage.accuracies[1:]
        )
        + tuple((entry.name, *harness_text(score)) for entry in entries for score in entry.stage.harness),
        differing=differing,
        settings=tuple(
            (label, tuple(_setting(values.get(key)) for key in differing))
            for label, values in zip(labels, flat, strict=True)
        ),
        warnings=_warnings(entries, reports),
    )


def shared_original(reports: Sequence[RunReport]) -> StageRecord | None:
    """The stage of the unchanged model, if the runs began with the same model measured on the same data."""
    first, *others = [_named(report, ORIGINAL) for report in reports]
    same = first is not None and all(
        other is not None and (first.accuracies, first.perplexity) == (other.accuracies, other.perplexity)
        for other in others
    )
    return first if same else None


def _entries(reports: Sequence[RunReport], labels: Sequence[str], stages: str) -> list[Entry]:
    if stages == "all":
        found = [
            Entry(f"{label}: {stage.name}", stage, report)
            for label, report in zip(labels, reports, strict=True)
            for stage in report.stages
        ]
    elif stages == "last":
        original = shared_original(reports)
        found = [] if original is None else [Entry(ORIGINAL, original, reports[0])]
        found += [Entry(label, report.stages[-1], report) for label, report in zip(labels, reports, strict=True)]
    else:
        found = [
            Entry(label, stage, report)
            for label, report in zip(labels, reports, strict=True)
            if (stage := _named(report, stages)) is not None
        ]
        if not found:
            known = sorted({stage.name for report in reports for stage in report.stages})
            raise ConfigError(Problem("--stages", f'no run has a stage "{stages}"', did_you_mean(stages, known)))
    return found


def _named(report: RunReport, name: str) -> StageRecord | None:
    return next((stage for stage in report.stages if stage.name == name), None)


def _tests(entries: Sequence[Entry]) -> tuple[Test, ...]:
    from scipy.stats import false_discovery_control

    first = entries[0].stage
    p_values: list[float | None] = []
    for entry in entries[1:]:
        try:
            pair = (first.accuracy, entry.stage.accuracy)
            p_values.append(compare_accuracy(*pair).p_value if pair[0] and pair[1] else None)
        except DataError:
            p_values.append(None)
    known = [value for value in p_values if value is not None]
    adjusted = iter(false_discovery_control(known).tolist() if known else [])
    return tuple(
        Test(
            entry.name,
            accuracy_change(first, entry.stage),
            NOT_MEASURED if value is None else f"{next(adjusted):.2g}",
            perplexity_change(first, entry.stage),
        )
        for entry, value in zip(entries[1:], p_values, strict=True)
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}.{index}", item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for path, item in pairs for key, leaf in _flatten(item, path).items()}


def _differing(recipes: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    flat = [_flatten(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values)
    return tuple(
        key
        for key in keys
        if key not in ("name", "output") and len({json.dumps(values.get(key)) for values in flat}) > 1
    )


def _setting(value: Any) -> str:
    return "" if value is None else str(value)


def _warnings(entries: Sequence[Entry], reports: Sequence[RunReport]) -> tuple[str, ...]:
    """Why figures of different rows may not compare."""
    warnings = []
    scored = {entry.stage.accuracy.references for entry in entries if entry.stage.accuracy}
    if len(scored) > 1:
        warnings.append("The runs were scored on different test examples: their accuracies do not compare.")
    if len({entry.stage.perplexity.text_sha256 for entry in entries if entry.stage.perplexity}) > 1:
        warnings.append("Perplexity was measured on different texts: the figures do not compare.")
    machines = {(r.machine.cpu, r.machine.threads, r.machine.gpus) for r in reports}
    timed = {
        (s.device, s.dtype, s.batch, s.prompt_tokens, s.new_tokens)
        for entry in entries
        if (s := entry.stage.latency) is not None
    }
    if timed and (len(machines) > 1 or len(timed) > 1):
        warnings.append("Speed was measured on different machines or with different settings: it does not compare.")
    seeds = {report.seed for report in reports}
    if len(reports) > 1 and len(seeds) == 1:
        warnings.append(f"Every run has seed {reports[0].seed}: the spread over seeds is not in the intervals.")
    return tuple(warnings)
