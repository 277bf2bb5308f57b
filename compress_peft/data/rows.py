"""From records to prompts and answers: derived fields, templates, truncation."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from compress_peft.data.chat import chat_prompt
from compress_peft.data.datasets import Record
from compress_peft.data.examples import FollowUp
from compress_peft.errors import DataError, Problem

if TYPE_CHECKING:
    from compress_peft.data.settings import DataSettings

JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@functools.cache
def _compiled(text: str) -> Callable[[Record], Any]:
    if "{{" in text or "{%" in text:
        return JINJA.from_string(text).render
    expression = JINJA.compile_expression(text, undefined_to_none=False)
    return lambda record: expression(record)


def check_field(text: str) -> None:
    """Raises:
    ValueError: the text is neither a Jinja expression nor a Jinja template.
    """
    try:
        _compiled(text)
    except TemplateError as error:
        raise ValueError(f"is no Jinja expression: {error} (given: {text!r})") from error


def fields_of(template: str) -> list[str]:
    """The fields in braces of a prompt or response."""
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


@dataclass(frozen=True)
class Reader:
    """Turns records into rows (a record with its derived fields; several where the data has `each`)."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase

    def rows(self, record: Record, where: str) -> list[Record]:
        """where: the record, for errors.

        Raises:
            DataError: a derived field cannot be worked out.
        """
        if self.settings.each is None:
            rows = [dict(record)]
        else:
            items = _items(self.settings.each, record, "data.each", where)
            rows = [{**record, "item": item, "index": index} for index, item in enumerate(items)]
        for name, text in self.settings.fields.items():
            for row in rows:
                row[name] = _value(text, row, f"data.fields.{name}", where)
        return rows

    def prompt(self, row: Record) -> str:
        """What the model reads.

        Raises:
            DataError: a field of the template holds no text, or the tokenizer has no chat template where one is wanted.
        """
        question = self.question(row)
        return (
            question if self.settings.chat is None else chat_prompt(self.tokenizer, [question], [], self.settings.chat)
        )

    def question(self, row: Record) -> str:
        """The prompt without the chat template.

        Raises:
            DataError: a field of the template holds no text.
        """
        cut = {field: truncate(str(row[field]), n, self.tokenizer) for field, n in self.settings.truncate.items()}
        return _render("prompt", self.settings.prompt, {**row, **cut})

    def follow_ups(self, row: Record) -> tuple[FollowUp, ...]:
        """The further turns of a dialogue.

        Raises:
            DataError: no list, or more answers than questions.
        """
        if self.settings.follow_ups is None:
            return ()
        questions = _items(self.settings.follow_ups, row, "data.follow_ups", "a record")
        answers: list[Any] = []
        if self.settings.follow_up_answers is not None:
            answers = list(_items(self.settings.follow_up_answers, row, "data.follow_up_answers", "a record"))
        if len(answers) > len(questions):
            what = f"has {len(answers)} answers to {len(questions)} questions after {self.question(row)[:80]!r}"
            raise DataError(Problem("data.follow_up_answers", what, "leave out the answer to the first question"))
        answers += [""] * (len(questions) - len(answers))
        return tuple(FollowUp(str(asked), str(known)) for asked, known in zip(questions, answers, strict=True))

    def asked(self, row: Record) -> str:
        """Everything that the user says: what makes an example another one."""
        return "\n".join([self.prompt(row), *(turn.question for turn in self.follow_ups(row))])

    def category(self, row: Record) -> str:
        """The group of the example, "" where the data have none."""
        text = self.settings.category
        return str(_value(text, row, "data.category", "a record")) if text is not None else ""

    def responses(self, row: Record) -> tuple[str, ...]:
        """Everything that counts as right: one response, or one for each item of a list in its field.

        Raises:
            DataError: the list is empty, or holds something else than text and numbers.
        """
        fields = fields_of(self.settings.response)
        values = row[fields[0]] if len(fields) == 1 else None
        if not isinstance(values, (list, tuple)):
            return (_render("response", self.settings.response, row),)
        if not values:
            what = f'the list "{fields[0]}" is empty: there is no right answer to {self.prompt(row)[:80]!r}'
            raise DataError(Problem("data.response", what, f"drop such records, e.g. by each: {fields[0]}"))
        return self._each_response(values)

    def options(self, row: Record) -> tuple[str, ...]:
        """The record's own candidate responses; none where the classes are the same for all records.

        Raises:
            DataError: the response has several fields.
        """
        name = self.settings.choices
        values = row[name] if isinstance(name, str) else None
        return self._each_response(values) if isinstance(values, (list, tuple)) else ()

    def classes(self, train: Sequence[Record]) -> tuple[str, ...]:
        """The candidate responses that all records share: as they are listed, or in alphabetical order.

        Raises:
            DataError: as `options`.
        """
        if self.settings.choices is None:
            return ()
        if isinstance(self.settings.choices, str):
            return tuple(sorted({response for row in train for response in self.responses(row)}))
        return self._each_response(self.settings.choices)

    def text(self, row: Record) -> str:
        """The plain text of a row."""
        fields = fields_of(self.settings.prompt)
        name = self.settings.text or max(fields, key=lambda field: len(str(row[field])), default="")
        return str(row.get(name, ""))

    def rationale(self, row: Record) -> str:
        template = self.settings.rationale
        return _render("rationale", template, row) if template is not None else ""

    def _each_response(self, values: Sequence[Any]) -> tuple[str, ...]:
        fields = fields_of(self.settings.response)
        if len(fields) != 1:
            what = "a list of classes needs a response with one field"
            raise DataError(Problem("data.choices", what, 'e.g. response: " {label}"'))
        return tuple(_render("response", self.settings.response, {fields[0]: value}) for value in values)


def _value(text: str, record: Record, key: str, where: str) -> Any:
    try:
        value = _compiled(text)(record)
        if isinstance(value, Undefined):
            str(value)  # raises, and says what is undefined
        return value
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        what = f"cannot be worked out for {where}: {error}"
        raise DataError(Problem(key, what, f"its fields are {', '.join(record)}")) from error


def _items(text: str, record: Record, key: str, where: str) -> Sequence[Any]:
    items = _value(text, record, key, where)
    if not isinstance(items, (list, tuple)):
        what = f"gives {items!r} for {where}"
        raise DataError(Problem(key, what, "name a field with a list, or a Jinja expression for one"))
    return items


def _render(key: str, template: str, record: Record) -> str:
    values = {field: record[field] for field in fields_of(template)}
    for field, value in values.items():
        if isinstance(value, (list, tuple, dict)):
            kind = "keys and values" if isinstance(value, dict) else "a list"
            fix = f"make text of it, e.g. fields: {{{field}_text: {field} | first}}"
            raise DataError(Problem(f"data.{key}", f'"{field}" is {kind}: {str(value)[:80]}', fix))
    return template.format(**values)


def truncate(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The longest prefix of whole characters within `tokens` tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if len(encoded.input_ids) <= tokens:
        return text
    if tokenizer.is_fast:
        return text[: encoded.offset_mapping[tokens - 1][1]]
    return str(tokenizer.decode(encoded.input_ids[:tokens]))
