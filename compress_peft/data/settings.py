"""The data section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from compress_peft.data.chat import Chat
from compress_peft.data.datasets import is_data_file, is_one_pool, split_file
from compress_peft.data.preset import SPLITS, completed, load_preset
from compress_peft.data.rows import check_field, fields_of


def _optional(schema: dict[str, Any]) -> None:
    """What a preset or a folder may supply need not stand in the YAML."""
    schema.pop("required", None)


def _prompt_or_preset(schema: dict[str, Any]) -> None:
    schema.pop("required", None)
    schema["anyOf"] = [{"required": ["preset"]}, {"required": ["prompt", "response"]}]


class SplitSource(BaseModel):
    """A split that has its own source instead of a share of the common one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        use_attribute_docstrings=True,
        json_schema_extra=_optional,
    )

    source: str = Field(alias="from")
    """A file, or a split of the hub data set or folder such as "validation[:50%]"."""
    count: PositiveInt | None = None
    """At most so many examples, drawn with the seed."""


class SplitSettings(BaseModel):
    """How many examples each split has, or where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_extra=_optional)

    train: NonNegativeInt | SplitSource
    """Number of training examples, or {from: file or split, count: n}. Of a preset's or a folder's own training
    split, a number takes so many. Several answers to one prompt count as one example here, and so do all of `each`.
    0, here and under validation: data to evaluate on and no more."""
    validation: NonNegativeInt | SplitSource
    """The same for validation (early stopping and the choice of the checkpoint)."""
    test: PositiveInt | SplitSource
    """The same for the test set, on which the report's figures stand."""

    @model_validator(mode="after")
    def _all_or_none(self) -> SplitSettings:
        given = [name for name in SPLITS if isinstance(getattr(self, name), SplitSource)]
        if given and len(given) != len(SPLITS):
            missing = ", ".join(name for name in SPLITS if name not in given)
            raise ValueError(f"{', '.join(given)} has its own source, so {missing} needs one too (from: ...)")
        if (self.train == 0) != (self.validation == 0):
            raise ValueError("train and validation are both 0 (data to evaluate on alone), or none of them is")
        return self

    @property
    def separate(self) -> bool:
        return isinstance(self.train, SplitSource)


_SOURCE_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"path": {"type": "string"}},
            "required": ["path"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}


class DataSettings(BaseModel):
    """The task: where the records are and how they become prompts and responses."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_extra=_prompt_or_preset
    )

    preset: str | None = None
    """A known task, e.g. squad: everything that is not given here comes from it, and so do the metrics under
    `evaluate` and the hyper-parameters of `finetune` steps (`python -m pipelines.methods --presets` lists them)."""
    source: Annotated[str | None, WithJsonSchema(_SOURCE_SCHEMA)] = None
    """bbc_news, gsm8k, a file (.jsonl .json .csv .tsv .parquet), a folder with train, validation and test files, or
    a hub id (org/name, org/name@revision); not needed if each split has its own. {path: ...} is always local."""
    subset: str | None = None
    """The configuration of a hub data set."""
    each: str | None = None
    """A field with a list, or a Jinja expression for one: each item makes an example of its own and is there as
    {item}, its place as {index}. All examples of a record land in one split."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Further fields, in this order: each a Jinja expression on the record (choices[answer]), or a Jinja template."""
    prompt: str
    """Template with the record's fields in braces, e.g. "{text}\\nTopic:"."""
    response: str
    """Template of the answer, with its leading space where the tokenizer wants one, e.g. " {label}". A list in its
    field holds several right answers: references in evaluation, an example each in training."""
    rationale: str | None = None
    """Template of the reasons for the answer, for a distill step with rationales."""
    choices: str | list[str] | None = None
    """For classification: the field whose values in the training split are the classes, or a list of its values,
    or a field with a list: each record's own options."""
    chat: Chat | None = None
    """The prompt is what a user says: "model" puts it into the chat template of the model's tokenizer, "plain" writes
    lines that start with "User: " and "Assistant: "."""
    follow_ups: str | None = None
    """A field with a list, or a Jinja expression for one: what the user says next, each time after the model's own
    answer. Asked in evaluation, where a judge grades every answer (`evaluate.task.judge`); needs `chat`."""
    follow_up_answers: str | None = None
    """The same for right answers to the follow-ups: shown to the judge where it asks for references, to nobody else."""
    category: str | None = None
    """A field, or a Jinja expression: groups whose grades are reported for themselves."""
    text: str | None = None
    """The field with plain text for perplexity and calibration; default: the longest one named in the prompt."""
    truncate: dict[str, PositiveInt] = Field(default_factory=dict)
    """Fields to cut to so many tokens, e.g. {text: 80}."""
    max_length: PositiveInt = 512
    """Prompt and response together, in tokens; longer prompts lose their start."""
    splits: SplitSettings
    """Sizes or sources of train, validation and test; a folder has them by name."""
    overlap: Literal["refuse", "drop"] = "refuse"
    """Prompts that two separate sources share: refuse the data, or drop them from training (and validation)."""
    seed: int = 0
    """Decides which records land in which split."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        return completed(given) if isinstance(given, dict) else given

    @field_validator("prompt", "response", "rationale")
    @classmethod
    def _is_template(cls, template: str | None) -> str | None:
        if template is None:
            return None
        try:
            fields = fields_of(template)
        except ValueError as error:
            raise ValueError(f"is no template: {error} (a brace itself is written {{{{ or }}}})") from error
        strange = [field for field in fields if not field.isidentifier()]
        if strange:
            raise ValueError(f'"{{{strange[0]}}}" is no field name (a brace itself is written {{{{ or }}}})')
        return template

    @field_validator("each", "follow_ups", "follow_up_answers", "category")
    @classmethod
    def _is_expression(cls, text: str | None) -> str | None:
        if text is not None:
            check_field(text)
        return text

    @field_validator("fields")
    @classmethod
    def _are_expressions(cls, fields: dict[str, str]) -> dict[str, str]:
        for name, text in fields.items():
            if not name.isidentifier():
                raise ValueError(f'"{name}" is no field name')
            try:
                check_field(text)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
        return fields

    @model_validator(mode="after")
    def _is_dialogue(self) -> DataSettings:
        if self.follow_ups is not None and self.chat is None:
            raise ValueError("follow_ups need chat: model (the tokenizer's chat template) or chat: plain")
        if self.follow_ups is not None and self.choices is not None:
            raise ValueError("follow_ups have no choices: their answers are generated and graded by a judge")
        if self.follow_up_answers is not None and self.follow_ups is None:
            raise ValueError("follow_up_answers need follow_ups")
        return self

    @model_validator(mode="after")
    def _has_source(self) -> DataSettings:
        if self.source is None and not self.splits.separate:
            raise ValueError("source is missing: give a data set, or a source for each split (splits.train.from)")
        if self.source is not None and self.splits.separate and is_one_pool(self.source):
            strange = [part for name in SPLITS if not is_data_file(part := getattr(self.splits, name).source)]
            if strange:
                raise ValueError(
                    f'"{self.source}" has no split {strange[0]}: give sizes (splits: {{train: 100, ...}}), or a file '
                    "for each split (splits.train.from)"
                )
        return self

    def files(self) -> dict[str, str]:
        """YAML key -> data source, of everything that must exist before the run."""
        if not self.splits.separate:
            return {"data.source": self.source or ""}
        found = {}
        for name in SPLITS:
            part = getattr(self.splits, name).source
            if self.source is None or is_data_file(part):
                found[f"data.splits.{name}.from"] = part
            elif (file := split_file(self.source, part)) is not None:
                found[f"data.splits.{name}.from"] = str(file)
            else:
                found["data.source"] = self.source
        return found

    def title(self, origin: str) -> str:
        """Name of the task in the report. origin: the name of its data."""
        return f"{load_preset(self.preset).title} ({origin})" if self.preset is not None else origin
