"""Generated answers graded from 1 to 10 by a language model: single-answer grading of MT-Bench.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685), appendix A: the prompt
for single-answer grading, its variant with a reference, and both for the later turns of a dialogue, which show the
whole conversation (FastChat's single-v1, single-math-v1 and the same with -multi-turn). Differences: the last
"[[rating]]" counts, since the rating follows the explanation; a rating that is missing or outside the scale is left out
and named, never guessed; the mean over all turns is one over dialogues, so that its interval counts a dialogue once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from compress_peft.data.examples import Example, FollowUp
from compress_peft.errors import DataError, Problem
from eval.chat import ChatSettings, ask_all
from eval.records import Judgement, TextScore
from eval.text_metrics import mean_score

METRIC = "judge's grade"
SYSTEM = "You are a helpful assistant."
_OPENING = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user "
    "question"
)
_DISPLAYED = " displayed below"
_QUALITY = (
    ". Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and "
    "level of detail of the response. "
)
_EXPLAIN = "Begin your evaluation by providing a short explanation. "
_CORRECT = (
    ". Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the "
    "assistant's answer. "
)
_COMPARE = (
    "Begin your evaluation by comparing the assistant's answer with the reference answer. Identify and correct any "
    "mistakes. "
)
_RATING = (
    "Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 "
    'by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\n'
)
_QUESTION = "[Question]\n{question}\n\n"
_ANSWER = "[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
PROMPT = f"[Instruction]\n{_OPENING}{_DISPLAYED}{_QUALITY}{_EXPLAIN}{_RATING}{_QUESTION}{_ANSWER}"
PROMPT_WITH_REFERENCE = (
    f"[Instruction]\n{_OPENING}{_DISPLAYED}{_CORRECT}{_COMPARE}{_RATING}{_QUESTION}"
    f"[The Start of Reference Answer]\n{{reference}}\n[The End of Reference Answer]\n\n{_ANSWER}"
)
LATER = (  # "You evaluation" as published
    f"{_OPENING}{_DISPLAYED}{_QUALITY}You evaluation should focus on the assistant's answer to the {{which}} user "
    f"question. {_EXPLAIN}{_RATING}"
)
LATER_WITH_REFERENCE = (
    f"{_OPENING}{_CORRECT}You evaluation should focus on the assistant's answer to the {{which}} question. "
    f"{_COMPARE}{_RATING}"
)
_FIELD = re.compile(r"\{(\w+)\}")
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
Messages = list[dict[str, str]]


class JudgeSettings(ChatSettings):
    """Grades from 1 to 10 by a language model behind an OpenAI-compatible endpoint."""

    reference: bool = False
    """Show the right answer to the judge (to nobody else), where one is known."""
    prompt: str | None = None
    """A prompt of one's own with {question}, {answer} and, with `reference`, {reference}, that asks for [[rating]]
    from 1 to 10; null: MT-Bench's. Later in a dialogue {question} holds all that was said before the answer."""

    @model_validator(mode="after")
    def _fields_of_the_prompt(self) -> JudgeSettings:
        if self.prompt is None:
            return self
        wanted = {"question", "answer"} | ({"reference"} if self.reference else set())
        given = set(_FIELD.findall(self.prompt))
        if given != wanted:
            told = [", ".join(f"{{{name}}}" for name in sorted(names)) or "none" for names in (wanted, given)]
            raise ValueError(f"prompt needs the fields {told[0]} (reference: {self.reference}), and has {told[1]}")
        return self


def parse_grade(reply: str) -> float | None:
    """The last "[[n]]" with n from 1 to 10; None where there is none."""
    found = _GRADE.findall(reply)
    grade = float(found[-1]) if found else 0.0
    return grade if 1.0 <= grade <= 10.0 else None


def judge_messages(settings: JudgeSettings, example: Example, answers: Sequence[str]) -> Messages:
    """What the judge reads to grade the last of `answers`, the model's to the first turns of the example.

    References of later turns are shown where all turns so far have one, as their prompt needs.
    """
    turns = len(answers)
    questions, known = example.questions[:turns], example.known[:turns]
    shown = settings.reference and all(known)
    if settings.prompt is not None or turns == 1:
        before = _talk([*zip(questions[:-1], answers[:-1], strict=True), (questions[-1], None)])
        values = {"question": questions[0] if turns == 1 else before, "answer": answers[-1]}
        values["reference"] = known[-1] or "none"
        template = settings.prompt or (PROMPT_WITH_REFERENCE if shown else PROMPT)
        return _messages(SYSTEM, _FIELD.sub(lambda match: values[match.group(1)], template))
    talk = _enclosed("Assistant A's Conversation with User", _talk([*zip(questions, answers, strict=True)]))
    if shown:
        right = _talk([*zip(questions, known, strict=True)], speaker="Reference answer")
        talk = f"{_enclosed('Reference Answer', right)}\n\n\n{talk}"
    instruction = LATER_WITH_REFERENCE if shown else LATER
    return _messages(instruction.replace("{which}", "second" if turns == 2 else "last"), talk)


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _talk(turns: Sequence[tuple[str, str | None]], speaker: str = "Assistant A") -> str:
    parts = [
        f"### User:\n{question}" + ("" if answer is None else f"\n\n### {speaker}:\n{answer}")
        for question, answer in turns
    ]
    return "\n\n".join(parts)


def _enclosed(name: str, text: str) -> str:
    return f"<|The Start of {name}|>\n\n{text}\n\n<|The End of {name}|>"


def judge_answers(
    settings: JudgeSettings, answers: Sequence[Sequence[str]], examples: Sequence[Example], task: str, cache: Path
) -> tuple[tuple[TextScore, ...], tuple[Judgement, ...]]:
    """Mean grade of the answers that got one, and all that the judge said, turn by turn of each example.

    Where examples have several turns, the mean of each turn follows, and where they have categories, that of each.

    answers: of each example, one a turn. cache: folder of the replies; what is in it is not asked again.

    Raises:
        DataError: no examples, or not one answer for each turn.
        MissingRequirement, CorruptFile: see `ask_all`.
    """
    if not answers or [len(given) for given in answers] != [len(example.questions) for example in examples]:
        what = f"answers to {len(answers)} examples for {len(examples)}: need equal, > 0, and one for each turn"
        raise DataError(Problem("answers", what))
    places = [(index, turn) for index, given in enumerate(answers) for turn in range(len(given))]
    asked = [judge_messages(settings, examples[index], answers[index][: turn + 1]) for index, turn in places]
    judgements = tuple(
        Judgement(answer=answers[index][turn], reply=reply, grade=parse_grade(reply), turn=turn + 1)
        for (index, turn), reply in zip(places, ask_all(settings, asked, cache), strict=True)
    )
    grades: list[dict[int, float]] = [{} for _ in examples]
    for (index, turn), judgement in zip(places, judgements, strict=True):
        if judgement.grade is not None:
            grades[index][turn] = judgement.grade
    turns = max(len(given) for given in answers)
    categories = list(dict.fromkeys(example.category for example in examples))
    parts = [(METRIC, [sum(found.values()) / len(found) if found else None for found in grades])]
    if turns > 1:
        parts += [(f"{METRIC}, turn {turn + 1}", [found.get(turn) for found in grades]) for turn in range(turns)]
    if len(categories) > 1:
        mean = parts[0][1]
        parts += [
            (
                f"{METRIC}, {category or 'no category'}",
                [
                    grade if example.category == category else None
                    for grade, example in zip(mean, examples, strict=True)
                ],
            )
            for category in sorted(categories)
        ]
    protocol = _protocol(settings, turns)
    scores = (_score(name, values, examples, task, protocol) for name, values in parts)
    return tuple(score for score in scores if score is not None), judgements


def _score(
    metric: str, grades: Sequence[float | None], examples: Sequence[Example], task: str, protocol: str
) -> TextScore | None:
    graded = [(grade, example) for grade, example in zip(grades, examples, strict=True) if grade is not None]
    if not graded:
        return None
    references = [(*example.questions, *example.right_answers, *example.known[1:]) for _, example in graded]
    return mean_score(metric, task, [grade for grade, _ in graded], references, protocol, share=False)


def _protocol(settings: JudgeSettings, turns: int) -> str:
    blank = Example("{question}", "{reference}", follow_ups=(FollowUp("{question}", "{reference}"),) * (turns - 1))
    shown = judge_messages(settings, blank, ["{answer}"] * turns)
    digest = hashlib.sha256("".join(message["content"] for message in shown).encode()).hexdigest()[:12]
    return (
        f"MT-Bench single-answer grading, 1 to 10, by {settings.model}, temperature {settings.temperature:g}, "
        f"{'own' if settings.prompt else 'default'} prompt {digest}, reference "
        f"{'shown' if settings.reference else 'not shown'}"
        + (f", up to {turns} turns, each after the model's own answers" if turns > 1 else "")
    )


def unparsed_note(judgements: Sequence[Judgement]) -> tuple[str, ...]:
    """Which replies hold no grade."""
    lost, index = [], -1
    for judgement in judgements:
        index += judgement.turn == 1
        if judgement.grade is None:
            lost.append(f"{index}" if judgement.turn == 1 else f"{index} (turn {judgement.turn})")
    if not lost:
        return ()
    return (f"The judge gave no grade for {len(lost)} of {len(judgements)} answers, left out: {', '.join(lost)}.",)
