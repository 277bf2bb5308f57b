"""Dialogues: the model answers each turn with its own earlier answers before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from compress_peft.data.chat import Chat, chat_prompt
from compress_peft.data.examples import Example
from compress_peft.errors import DataError, Problem

Generate = Callable[[Sequence[Example]], list[str]]


def answer_turns(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    chat: Chat,
    *,
    max_length: int,
    max_new_tokens: int,
) -> list[tuple[str, ...]]:
    """The model's answers to the turns of each example, without white space around them.

    generate: answers to the prompts of examples, in their order; gets nothing else of a dialogue than the text so far.
    max_length: of a prompt, in tokens.

    Raises:
        DataError: a dialogue with answers of max_new_tokens does not fit into max_length; found before any answer.
    """
    longest = max(_tokens(tokenizer, example, chat, max_new_tokens) for example in examples)
    if longest > max_length:
        what = f"{max_length} tokens; a dialogue can grow to {longest} before its last answer and would lose its start"
        raise DataError(Problem("data.max_length", what, "raise it, or lower evaluate.task.max_new_tokens"))
    answers: list[list[str]] = [[] for _ in examples]
    for turn in range(max(len(example.questions) for example in examples)):
        under_way = [index for index, example in enumerate(examples) if turn < len(example.questions)]
        prompts = [
            Example(chat_prompt(tokenizer, examples[index].questions[: turn + 1], answers[index], chat), "")
            for index in under_way
        ]
        for index, answer in zip(under_way, generate(prompts), strict=True):
            answers[index].append(answer.strip())
    return [tuple(given) for given in answers]


def _tokens(tokenizer: PreTrainedTokenizerBase, example: Example, chat: Chat, max_new_tokens: int) -> int:
    earlier = len(example.questions) - 1
    text = chat_prompt(tokenizer, example.questions, [""] * earlier, chat)
    return len(tokenizer(text).input_ids) + earlier * max_new_tokens
