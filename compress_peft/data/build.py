"""From records to disjoint train, validation and test examples."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from compress_peft.data.datasets import Origin, Record, load_records
from compress_peft.data.examples import Example, checksum
from compress_peft.errors import DataError, Problem, did_you_mean

SPLITS = ("train", "validation", "test")


class SplitSource(BaseModel):
    """A split that has its own source instead of a share of the common one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    source: str = Field(alias="from")
    """A file, or a split of the hub data set such as "validation[:50%]"."""
    count: PositiveInt | None = None
    """At most so many examples, drawn with the seed."""


class SplitSettings(BaseModel):
    """How many examples each split has, or where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: PositiveInt | SplitSource
    """Number of training examples, or {from: file or split, count: n}."""
    validation: PositiveInt | SplitSource
    """The same for validation (early stopping and the choice of the checkpoint)."""
    test: PositiveInt | SplitSource
    """The same for the test set, on which the report's figures stand."""

    @model_validator(mode="after")
    def _all_or_none(self) -> SplitSettings:
        given = [name for name in SPLITS if isinstance(getattr(self, name), SplitSource)]
        if given and len(given) != len(SPLITS):
            missing = ", ".join(name for name in SPLITS if name not in given)
            raise ValueError(f"{', '.join(given)} has its own source, so {missing} needs one too (from: ...)")
        return self

    @property
    def separate(self) -> bool:
        return isinstance(self.train, SplitSource)


class DataSettings(BaseModel):
    """The task: where the records are and how they become prompts and responses."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str | None = None
    """bbc_news, gsm8k, a file (.jsonl .json .csv .tsv .parquet) or a hub id; not needed if each split has its own."""
    subset: str | None = None
    """The configuration of a hub data set."""
    prompt: str
    """Template with the record's fields in braces, e.g. "{text}\\nTopic:"."""
    response: str
    """Template of the answer, with its leading space where the tokenizer wants one, e.g. " {label}"."""
    rationale: str | None = None
    """Template of the reasons for the answer, for a distill step with rationales."""
    choices: str | list[str] | None = None
    """For classification: the field whose values in the training split are the classes, or a list of its values."""
    text: str | None = None
    """The field with plain text for perplexity and calibration; default: the longest one named in the prompt."""
    truncate: dict[str, PositiveInt] = Field(default_factory=dict)
    """Fields to cut to so many tokens, e.g. {text: 80}."""
    max_length: PositiveInt = 512
    """Prompt and response together, in tokens; longer prompts lose their start."""
    splits: SplitSettings
    """Sizes or sources of train, validation and test."""
    seed: int = 0
    """Decides which records land in which split."""

    @field_validator("prompt", "response", "rationale")
    @classmethod
    def _is_template(cls, template: str | None) -> str | None:
        if template is None:
            return None
        try:
            fields = _fields_of(template)
        except ValueError as error:
            raise ValueError(f"is no template: {error} (a brace itself is written {{{{ or }}}})") from error
        strange = [field for field in fields if not field.isidentifier()]
        if strange:
            raise ValueError(f'"{{{strange[0]}}}" is no field name (a brace itself is written {{{{ or }}}})')
        return template

    @model_validator(mode="after")
    def _has_source(self) -> DataSettings:
        if self.source is None and not self.splits.separate:
            raise ValueError("source is missing: give a data set, or a source for each split (splits.train.from)")
        return self

    def files(self) -> dict[str, str]:
        """YAML key -> data source, of everything that must exist before the run."""
        if not self.splits.separate:
            return {"data.source": self.source or ""}
        if self.source is not None:
            return {"data.source": self.source}
        return {f"data.splits.{name}.from": getattr(self.splits, name).source for name in SPLITS}


@dataclass(frozen=True)
class TaskData:
    """Disjoint splits of one task."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    origin: Origin
    duplicates_dropped: int

    def facts(self) -> dict[str, Any]:
        """Sizes, checksums and licence for the report."""
        sizes = {
            name: {"examples": len(getattr(self, name)), "sha256": checksum(getattr(self, name))} for name in SPLITS
        }
        return {
            "name": self.origin.name,
            "licence": self.origin.licence,
            "splits": sizes,
            "duplicates_dropped": self.duplicates_dropped,
        }


def build_data(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Read, deduplicate, split and format the task's data.

    Records whose prompts (after truncation) agree but for white space and case count once, so that no prompt
    stands in two splits.

    Raises:
        MissingRequirement: a source is not to be had here.
        DataError: empty or too small data, unknown fields, or separate sources that share texts.
    """
    sources, origin = _load(settings)
    problems = _field_problems(settings, sources)
    if problems:
        raise DataError(problems)
    drawn = {}
    for name, found in sources.items():
        unique = {_key(settings, record, tokenizer): record for record in found}
        keys = sorted(unique)  # the order of the file must not matter, only the seed
        random.Random(settings.seed).shuffle(keys)
        drawn[name] = {key: unique[key] for key in keys}
    dropped = sum(map(len, sources.values())) - sum(map(len, drawn.values()))
    splits = _share(settings, drawn)
    _refuse_overlap(splits)
    records = {name: list(part.values()) for name, part in splits.items()}
    classes = _classes(settings, records["train"])
    _refuse_unknown_classes(settings, records, classes)
    made = {
        name: tuple(_example(settings, record, classes, tokenizer) for record in part) for name, part in records.items()
    }
    return TaskData(**made, origin=origin, duplicates_dropped=dropped)


Keyed = dict[bytes, Record]


def _key(settings: DataSettings, record: Record, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Identity of a record: its truncated prompt without regard to white space and case."""
    prompt = _render(settings.prompt, _truncated(settings, record, tokenizer))
    return hashlib.sha256(" ".join(prompt.lower().split()).encode()).digest()


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
        if settings.source is None:
            found[name], origin = load_records(part.source)
        else:
            found[name], origin = load_records(settings.source, settings.subset, part.source)
        origins.append(origin)
    names = dict.fromkeys(origin.name for origin in origins)
    return found, Origin(", ".join(names), origins[0].licence)


def _share(settings: DataSettings, drawn: dict[str, Keyed]) -> dict[str, Keyed]:
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


def _refuse_overlap(splits: dict[str, Keyed]) -> None:
    problems = []
    for index, first in enumerate(SPLITS):
        for second in SPLITS[index + 1 :]:
            shared = len(splits[first].keys() & splits[second].keys())
            if shared:
                problems.append(
                    Problem(
                        f"data.splits.{second}.from",
                        f"{shared} of its {len(splits[second])} prompts stand in the {first} split too",
                        f"remove them from one of the two: a {second} score on {first} text means nothing",
                    )
                )
    if problems:
        raise DataError(problems)


def _refuse_unknown_classes(settings: DataSettings, records: dict[str, list[Record]], classes: tuple[str, ...]) -> None:
    responses = [_render(settings.response, record) for part in records.values() for record in part]
    unknown = sorted({response for response in responses if classes and response not in classes})
    if unknown:
        raise DataError(
            Problem(
                "data.choices",
                f"{len(unknown)} responses are no class of the training split, e.g. {unknown[0]!r}",
                "list all classes under data.choices",
            )
        )


def _fields_of(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def _field_problems(settings: DataSettings, sources: dict[str, list[Record]]) -> list[Problem]:
    uses = {"prompt": _fields_of(settings.prompt), "response": _fields_of(settings.response)}
    uses["rationale"] = _fields_of(settings.rationale or "")
    uses["truncate"] = list(settings.truncate)
    uses["text"] = [settings.text] if settings.text else []
    uses["choices"] = [settings.choices] if isinstance(settings.choices, str) else []
    problems = []
    for name, records in sources.items():
        where = "data.source" if name == "data" else f"data.splits.{name}.from"
        if not records:
            problems.append(Problem(where, "has no records", "give a source with data"))
            continue
        known = set.intersection(*(set(record) for record in records))
        for key, fields in uses.items():
            problems += [
                Problem(f"data.{key}", f'no field "{field}" in the records of {where}', did_you_mean(field, known))
                for field in fields
                if field not in known
            ]
    return list(dict.fromkeys(problems))


def _classes(settings: DataSettings, train: Sequence[Record]) -> tuple[str, ...]:
    """The candidate responses, already through the response template, in alphabetical order."""
    if settings.choices is None:
        return ()
    if isinstance(settings.choices, str):
        return tuple(sorted({_render(settings.response, record) for record in train}))
    fields = _fields_of(settings.response)
    if len(fields) != 1:
        raise DataError(
            Problem("data.choices", "a list of classes needs a response with one field", 'e.g. response: " {label}"')
        )
    return tuple(settings.response.format(**{fields[0]: value}) for value in settings.choices)


def _render(template: str, record: Record) -> str:
    return template.format(**{field: record[field] for field in _fields_of(template)})


def _truncated(settings: DataSettings, record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
    cut = {field: truncate(str(record[field]), n, tokenizer) for field, n in settings.truncate.items()}
    return {**record, **cut}


def _example(
    settings: DataSettings, record: Record, classes: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Example:
    fields = _fields_of(settings.prompt)
    text = settings.text or max(fields, key=lambda field: len(str(record[field])), default="")
    return Example(
        prompt=_render(settings.prompt, _truncated(settings, record, tokenizer)),
        response=_render(settings.response, record),
        choices=classes,
        text=str(record.get(text, "")),
        rationale=_render(settings.rationale, record) if settings.rationale is not None else "",
    )


def truncate(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The longest prefix of whole characters within `tokens` tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if len(encoded.input_ids) <= tokens:
        return text
    if tokenizer.is_fast:
        return text[: encoded.offset_mapping[tokens - 1][1]]
    return str(tokenizer.decode(encoded.input_ids[:tokens]))
