"""Conversations as text: what a chat model reads before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from compress_peft.errors import DataError, Problem

Chat = Literal["model", "plain"]
PLAIN_STOP = "\nUser:"
"""Where a model that goes on writing a plain conversation has finished its answer."""


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], answers: Sequence[str], chat: Chat
) -> str:
    """The conversation up to where the answer to the last question starts.

    answers: to all questions but the last. chat: "model", the tokenizer's own template; "plain", lines that start with
    "User: " and "Assistant: ", as the preset ultrachat has them.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    said = [text for pair in zip(questions, answers, strict=False) for text in pair] + [questions[-1]]
    if chat == "plain":
        lines = [f"{'Assistant' if place % 2 else 'User'}: {text}\n" for place, text in enumerate(said)]
        return "".join(lines) + "Assistant:"
    if not tokenizer.chat_template:
        fix = 'chat: plain writes "User: " and "Assistant: " instead'
        raise DataError(Problem("data.chat", "the model's tokenizer has no chat template", fix))
    messages = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(said)]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    start = tokenizer.bos_token
    if start and text.startswith(start) and list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(start)  # the tokenizer puts it there
    return text
