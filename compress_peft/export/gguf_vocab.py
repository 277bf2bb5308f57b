"""A Hugging Face tokenizer in the words of GGUF: tokens, types, merges or scores, how text is split, chat template."""

from __future__ import annotations

import json
from typing import Any

from compress_peft.errors import ModelError, Problem

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
"""Regular expression of a Split pre-tokenizer -> what llama.cpp calls it."""


def add_tokenizer(writer: Any, tokenizer: Any, size: int, pre: str | None) -> None:
    """size: rows of the embedding. pre: llama.cpp's name of the pre-tokenizer; None: found from the tokenizer.

    Raises:
        ModelError: llama.cpp has no such tokenizer, or it is not known which of its pre-tokenizers it is.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(Problem("tokenizer", "has no tokenizer.json", "save it with a fast tokenizer first"))
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        fix = "export to a Hugging Face format, e.g. format: folder"
        raise ModelError(Problem("tokenizer", f"is of type {model['type']}, only BPE is written", fix))
    tokens, types = _tokens(described, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):  # SentencePiece: llama.cpp merges by score, so earlier merges score higher
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        rank = {merge.replace(" ", "", 1): -index for index, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([float(rank.get(token, -len(merges))) for token in tokens])
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_tokenizer(described))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    plain = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(plain) and plain[0] == ids["bos"])
    writer.add_add_eos_token(bool(plain) and plain[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. described: tokenizer.json.

    Raises:
        ModelError: it is none of those known here.
    """
    found = described.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and (parts[0].get("use_regex", True) or not described["model"]["merges"]):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    what = f"splits text by {' and '.join(map(str, kinds))}, and it is not known what llama.cpp calls that"
    raise ModelError(Problem("tokenizer", what, "say it with pre_tokenizer: (llama.cpp's name, e.g. llama-bpe)"))


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    model = described["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for index, token in tokens.items():
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
        elif token == model.get("unk_token"):
            types[index] = UNKNOWN
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types.get(added["id"]) != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(tokens) >= size:
        what = f"has {max(tokens) + 1} tokens, the embedding has {size}"
        raise ModelError(Problem("tokenizer", what, "use the tokenizer that belongs to the model"))
    return (
        [tokens.get(index, f"[PAD{index}]") for index in range(size)],
        [types.get(index, UNUSED) for index in range(size)],
    )


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether text gets a space in front, as SentencePiece does by default."""
    text = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
