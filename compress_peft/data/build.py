"""From records to disjoint train, validation and test examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from compress_peft.data.datasets import Origin, Record, is_data_file, load_records
from compress_peft.data.examples import Example, checksum
from compress_peft.data.preset import SPLITS, load_preset
from compress_peft.data.rows import Reader, fields_of
from compress_peft.data.settings import DataSettings, SplitSource
from compress_peft.errors import DataError, Problem, did_you_mean


@dataclass(frozen=True)
class TaskData:
    """Disjoint splits of one task."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    origin: Origin
    duplicates_dropped: int
    details: Mapping[str, Any] = field(default_factory=dict)
    """More that the report says: the preset with its version, what else was dropped."""

    def facts(self) -> dict[str, Any]:
        """Sizes, checksums and licence for the report."""
        sizes = {
            name: {"examples": len(getattr(self, name)), "sha256": checksum(getattr(self, name))} for name in SPLITS
        }
        return {
            "name": self.origin.name,
            "licence": self.origin.licence,
            "splits": sizes,
            "details": {"duplicates_dropped": self.duplicates_dropped, **self.details},
        }


@dataclass
class Unit:
    """Records that must not be parted: their first prompts agree.

    prompts: identities of the prompts of all their rows.
    """

    records: list[Record] = field(default_factory=list)
    prompts: set[bytes] = field(default_factory=set)


Units = dict[bytes, Unit]


@dataclass(frozen=True)
class Pool:
    """The different units of one source, shuffled. duplicates: rows that said what another one says. empty: records
    without any row."""

    units: Units
    duplicates: int
    empty: int


def build_data(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Read, deduplicate, split and format the task's data.

    Records whose prompts (after truncation) agree but for white space and case stay together, so that no prompt
    stands in two splits. Of a task with choices one of them counts; otherwise their answers become references of one
    example in validation and test, and an example each in training.

    Raises:
        MissingRequirement: a source is not to be had here.
        DataError: empty or too small data, unknown fields, or separate sources that share texts.
    """
    sources, origin = _load(settings)
    problems = _field_problems(settings, sources)
    if problems:
        raise DataError(problems)
    reader = Reader(settings, tokenizer)
    pools = {name: _pool(reader, records, f"of {_where(name)}") for name, records in sources.items()}
    units = {name: pool.units for name, pool in pools.items()}
    details = {"records_without_examples": sum(pool.empty for pool in pools.values())}
    if settings.splits.separate and settings.overlap == "drop":
        details["shared_with_other_splits_dropped"] = _drop_shared(units)
    splits = _share(settings, units)
    _refuse_overlap(settings, splits)
    rows = {name: [_rows_by_prompt(reader, unit) for unit in part.values()] for name, part in splits.items()}
    shared = reader.classes([alternatives[0] for unit in rows["train"] for alternatives in unit])
    made = {
        name: tuple(
            example
            for unit in part
            for alternatives in unit
            for example in _examples(reader, alternatives, shared, apart=name == "train")
        )
        for name, part in rows.items()
    }
    _refuse_unknown_classes(made)
    return TaskData(
        **made,
        origin=replace(origin, name=settings.title(origin.name)),
        duplicates_dropped=sum(pool.duplicates for pool in pools.values()),
        details=_preset_facts(settings) | {key: count for key, count in details.items() if count},
    )


def _preset_facts(settings: DataSettings) -> dict[str, Any]:
    if settings.preset is None:
        return {}
    preset = load_preset(settings.preset)
    return {"preset": f"{settings.preset}, version {preset.version}", "paper": preset.paper}


def _identity(prompt: str) -> bytes:
    """The same for prompts that agree but for white space and case."""
    return hashlib.sha256(" ".join(prompt.lower().split()).encode()).digest()


def _where(name: str) -> str:
    return "data.source" if name == "data" else f"data.splits.{name}.from"


def _load(settings: DataSettings) -> tuple[dict[str, list[Record]], Origin]:
    """The records by source: one pool named "data", or one list a split."""
    if not settings.splits.separate:
        assert settings.source is not None
        records, origin = load_records(settings.source, settings.subset)
        return {"data": records}, origin
    found: dict[str, list[Record]] = {}
    origins = []
    for name in SPLITS:
        part: SplitSource = getattr(settings.splits, name)
        if settings.source is None or is_data_file(part.source):
            found[name], origin = load_records(part.source)
        else:
            found[name], origin = load_records(settings.source, settings.subset, part.source)
        origins.append(origin)
    names = dict.fromkeys(origin.name for origin in origins)
    return found, Origin(", ".join(names), origins[0].licence)


def _pool(reader: Reader, records: Iterable[Record], where: str) -> Pool:
    found: Units = {}
    seen: set[tuple[bytes, tuple[str, ...]]] = set()
    rows_read = empty = 0
    for number, record in enumerate(records):
        rows = reader.rows(record, f"record {number} {where}")
        empty += not rows
        rows_read += len(rows)
        keys = [_identity(reader.asked(row)) for row in rows]
        says = {(key, reader.responses(row)) for key, row in zip(keys, rows, strict=True)}
        if says <= seen:
            continue
        seen |= says
        unit = found.setdefault(keys[0], Unit())
        unit.records.append(record)
        unit.prompts.update(keys)
    order = sorted(found)  # the order of the file must not matter, only the seed
    random.Random(reader.settings.seed).shuffle(order)
    different = len({key for key, _ in seen}) if reader.settings.choices is not None else len(seen)
    return Pool({key: found[key] for key in order}, rows_read - different, empty)


def _drop_shared(units: dict[str, Units]) -> int:
    """Take prompts of the test set out of validation, and those of both out of training; returns how many units."""
    taken: set[bytes] = set()
    dropped = 0
    for name in reversed(SPLITS):
        kept = {key: unit for key, unit in units[name].items() if not unit.prompts & taken}
        dropped += len(units[name]) - len(kept)
        units[name] = kept
        taken |= {prompt for unit in kept.values() for prompt in unit.prompts}
    return dropped


def _share(settings: DataSettings, drawn: dict[str, Units]) -> dict[str, Units]:
    """The splits, cut to their sizes."""
    if settings.splits.separate:
        return {name: dict(list(drawn[name].items())[: getattr(settings.splits, name).count]) for name in SPLITS}
    pool = list(drawn["data"].items())
    wanted = {name: int(getattr(settings.splits, name)) for name in SPLITS}
    if len(pool) < sum(wanted.values()):
        raise DataError(
            Problem(
                "data.splits",
                f"{sum(wanted.values())} examples are asked for, {settings.source} has {len(pool)} different ones",
                "lower the sizes under data.splits or give more data",
            )
        )
    splits, start = {}, 0
    for name in reversed(SPLITS):  # the test set stays the same when only the training set grows
        splits[name] = dict(pool[start : start + wanted[name]])
        start += wanted[name]
    return splits


def _refuse_overlap(settings: DataSettings, splits: dict[str, Units]) -> None:
    prompts = {name: {prompt for unit in part.values() for prompt in unit.prompts} for name, part in splits.items()}
    problems = []
    for index, first in enumerate(SPLITS):
        for second in SPLITS[index + 1 :]:
            shared = len(prompts[first] & prompts[second])
            if shared:
                what = f"{shared} of its {len(prompts[second])} prompts stand in the {first} split too"
                fix = f"set overlap: drop, or remove them from one of the two: a {second} score on {first} text means"
                problems.append(Problem(f"data.splits.{second}.from", what, f"{fix} nothing"))
    empty = [
        Problem(f"data.splits.{name}", "has no example left", "give more data")
        for name, part in splits.items()
        if not part and getattr(settings.splits, name) != 0
    ]
    if problems or empty:
        raise DataError(problems + empty)


def _rows_by_prompt(reader: Reader, unit: Unit) -> list[list[Record]]:
    """The unit's rows, those with the same prompt together; the order of the records does not matter."""
    found: dict[bytes, dict[tuple[str, ...], Record]] = {}
    for record in unit.records:
        for row in reader.rows(record, "a record"):
            found.setdefault(_identity(reader.asked(row)), {}).setdefault(reader.responses(row), row)
    return [[alternatives[answers] for answers in sorted(alternatives)] for alternatives in found.values()]


def _examples(reader: Reader, alternatives: list[Record], shared: tuple[str, ...], apart: bool) -> list[Example]:
    """The examples of one prompt: several only where the right answers are learned one by one (apart)."""
    first = alternatives[0]
    if reader.settings.choices is not None:
        _refuse_several_answers(reader.responses(first))
        return [replace(_example(reader, first), choices=reader.options(first) or shared)]
    if apart:
        right: dict[str, Record] = {}
        for row in alternatives:
            for response in reader.responses(row):
                right.setdefault(response, row)
        return [replace(_example(reader, row), response=response) for response, row in right.items()]
    references = tuple(response for row in alternatives for response in reader.responses(row))
    return [replace(_example(reader, first), references=references if len(references) > 1 else ())]


def _example(reader: Reader, row: Record) -> Example:
    return Example(
        prompt=reader.prompt(row),
        response=reader.responses(row)[0],
        text=reader.text(row),
        rationale=reader.rationale(row),
        question=reader.question(row) if reader.settings.chat is not None else "",
        follow_ups=reader.follow_ups(row),
        category=reader.category(row),
    )


def _refuse_several_answers(responses: Sequence[str]) -> None:
    if len(responses) > 1:
        what = f"a task with choices has one right answer, and here are {len(responses)}, e.g. {responses[:2]}"
        raise DataError(Problem("data.response", what, "take one of the list, e.g. fields: {answer: answers[0]}"))


def _refuse_unknown_classes(made: Mapping[str, Sequence[Example]]) -> None:
    examples = [example for part in made.values() for example in part if example.choices]
    unknown = sorted({example.response for example in examples if example.response not in example.choices})
    if unknown:
        raise DataError(
            Problem(
                "data.choices",
                f"{len(unknown)} responses are no class of the training split or option of their record, e.g. "
                f"{unknown[0]!r}",
                "list all classes under data.choices",
            )
        )


def _field_problems(settings: DataSettings, sources: dict[str, list[Record]]) -> list[Problem]:
    """Empty sources, and fields that are named and not there."""
    uses = {"prompt": fields_of(settings.prompt), "response": fields_of(settings.response)}
    uses["rationale"] = fields_of(settings.rationale or "")
    uses["truncate"] = list(settings.truncate)
    uses["text"] = [settings.text] if settings.text else []
    uses["choices"] = [settings.choices] if isinstance(settings.choices, str) else []
    made = set(settings.fields) | ({"item", "index"} if settings.each is not None else set())
    problems = []
    for name, records in sources.items():
        where = _where(name)
        if not records:
            problems.append(Problem(where, "has no records", "give a source with data"))
            continue
        known = made.union(set.intersection(*(set(record) for record in records)))
        for key, fields in uses.items():
            problems += [
                Problem(f"data.{key}", f'no field "{used}" in the records of {where}', did_you_mean(used, known))
                for used in fields
                if used not in known
            ]
    return list(dict.fromkeys(problems))
