"""Distilling step by step: the reasons for an answer as a second task (Hsieh et al. 2023, arXiv 2305.02301)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator
from transformers import PreTrainedTokenizerBase

from compress_peft.data.encode import encode_example
from compress_peft.data.examples import Example
from compress_peft.errors import DataError, Problem
from compress_peft.training.batches import TokenPair


class RationaleSettings(BaseModel):
    """Two tasks, told apart by a prefix of the prompt: the answer, and the reasons for it.

    At inference only the first is asked for, so reasons cost nothing then. The paper prefixes both tasks ("[label]"
    and "[rationale]"); here the answer has no prefix unless one is given, so that the model is asked as it was before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    source: Literal["data", "teacher"] = Field(default="data", alias="from")
    """data: data.rationale; teacher: it writes them, once, given the prompt and the right answer."""
    share: PositiveFloat = 1.0
    """Weight of the rationales' mean loss beside that of the answers (lambda of eq. 3)."""
    prefix: str = "[rationale] "
    """Before the prompt when the reasons are asked for."""
    answer_prefix: str = ""
    """Before the prompt when the answer is asked for; prompts of the evaluation do not have it."""
    question: str = "{prompt}{response}\nExplanation:"
    """What the teacher goes on from when it writes the reasons."""

    @field_validator("question")
    @classmethod
    def _has_fields(cls, question: str) -> str:
        try:
            question.format(prompt="", response="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"must be a template of {{prompt}} and {{response}}: {error}") from error
        return question

    def answers(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, eos: bool
    ) -> list[TokenPair]:
        """Rows of the first task."""
        return [
            encode_example(tokenizer, self.answer_prefix + item.prompt, item.response, max_length=max_length, eos=eos)
            for item in examples
        ]

    def reasons(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], texts: Sequence[str], max_length: int
    ) -> list[TokenPair]:
        """Rows of the second task. texts: the rationales.

        Raises:
            DataError: some are empty.
        """
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty:
            what = (
                f"{len(empty)} of {len(texts)} examples have no rationale, the first is {examples[empty[0]].prompt!r}"
            )
            raise DataError(Problem("rationales", what, "give them in the data, or raise generation.max_new_tokens"))
        return [
            encode_example(tokenizer, self.prefix + item.prompt, text, max_length=max_length, eos=True)
            for item, text in zip(examples, texts, strict=True)
        ]
