"""The example: what every task, data set and metric has in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FollowUp:
    """What the user says after the model's own answer.

    question: as the user says it, without any template.
    known: a right answer, for a judge; "" where none is known. Never part of a prompt.
    """

    question: str
    known: str = ""


@dataclass(frozen=True)
class Example:
    """A prompt and the response that the model should give.

    prompt: the text before the response, already through the template and truncated.
    response: the text to learn or to score; starts with a space where the tokenizer wants one.
    choices: the candidate responses of a classification example (the right one among them), else empty.
    text: the whole source document, for perplexity and calibration.
    rationale: why the response is right, for distilling step by step.
    references: all right answers to a generated one, the response among them; empty where it is the only one.
    question: what the user says, where the prompt is more than that (a chat template around it).
    follow_ups: the further turns of a dialogue, asked one after the other in evaluation.
    category: the group whose scores are reported for themselves; "" where there are none.
    """

    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    text: str = ""
    rationale: str = ""
    references: tuple[str, ...] = ()
    question: str = ""
    follow_ups: tuple[FollowUp, ...] = ()
    category: str = ""

    @property
    def questions(self) -> tuple[str, ...]:
        """What the user says in each turn."""
        return (self.question or self.prompt, *(turn.question for turn in self.follow_ups))

    @property
    def known(self) -> tuple[str, ...]:
        """What is right in each turn, several right answers on lines of their own; "" where nothing is known."""
        return ("\n".join(dict.fromkeys(self.right_answers)), *(turn.known.strip() for turn in self.follow_ups))

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All texts that count as right, without white space around them."""
        return tuple(text.strip() for text in self.references or (self.response,))


def checksum(examples: Iterable[Example]) -> str:
    """SHA-256 over prompts, responses, choices and follow-ups, in order; identifies a split in the report."""
    digest = hashlib.sha256()
    for example in examples:
        later = [part for turn in example.follow_ups for part in (turn.question, turn.known)]
        for part in (example.prompt, example.response, *example.choices, *example.references, *later):
            digest.update(part.encode())
            digest.update(b"\x00")
        digest.update(b"\x01")
    return digest.hexdigest()
