"""Dialogues: MT-Bench's rows, the model's own answers before each further question, and what the judge sees of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress_peft.adapters import Para
from compress_peft.data.build import build_data
from compress_peft.data.chat import chat_prompt
from compress_peft.data.examples import Example, FollowUp, checksum
from compress_peft.data.settings import DataSettings
from compress_peft.errors import ConfigError, DataError
from compress_peft.models.random_model import byte_tokenizer
from eval.dialogue import answer_turns
from eval.generation import generate_answers
from eval.judge import JudgeSettings, judge_answers, judge_messages, unparsed_note
from eval.records import RunReport
from pipelines.recipe import parse_recipe
from pipelines.run import EXIT_DONE, main
from tests.conftest import build_tiny_llama
from tests.eval.test_judge import Judge, server  # noqa: F401  a fixture
from tests.pipelines.conftest import recipe, write_recipe  # noqa: F401  a fixture

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."], "reference": ["ROSES", "R"]},
    {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "And squared?"], "reference": ["TWO", "FOUR"]},
    {"question_id": 112, "category": "math", "turns": ["What is 1+1?", "And halved?"], "reference": ["TWO", "ONE"]},
]
PLAIN = JudgeSettings(endpoint="http://h/v1", model="j")
SHOWN = PLAIN.model_copy(update={"reference": True})


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def questions(file: Path, tokenizer: Any = None, **changes: Any) -> dict[str, Example]:
    """The test split by last question."""
    settings = DataSettings(preset="mt_bench", source=str(file), **({"splits": {"test": 3}} | changes))
    data = build_data(settings, tokenizer or chat_tokenizer())
    assert data.train == data.validation == ()
    return {example.questions[-1]: example for example in data.test}


def test_questions_of_fastchat_and_of_the_hub_are_the_same_examples(tmp_path: Path) -> None:
    found = questions(write(tmp_path / "question.jsonl"))
    assert list(sorted(found)) == ["And halved?", "And squared?", "Shorter."]  # equal first questions are no duplicates
    squared = found["And squared?"]
    assert squared.prompt == "<s><user>What is 1+1?\n<assistant>" and squared.category == "math"
    assert squared.questions == ("What is 1+1?", "And squared?") and squared.known == ("TWO", "FOUR")
    assert found["Shorter."].known == ("", "")  # references in math, reasoning and coding alone
    hub = [{"prompt_id": r["question_id"], "prompt": r["turns"], **r} for r in ROWS]
    for row in hub:
        del row["turns"]
    assert questions(write(tmp_path / "hub.jsonl", hub)) == found
    assert questions(write(tmp_path / "back.jsonl", ROWS[::-1])) == found
    bare = [{key: value for key, value in row.items() if key != "reference"} for row in ROWS]
    assert {item.known for item in questions(write(tmp_path / "bare.jsonl", bare)).values()} == {("", "")}
    other = [{**ROWS[1], "reference": ["TWO", "4"]}, *ROWS[::2]]
    changed = questions(write(tmp_path / "other.jsonl", other))
    assert checksum(changed.values()) != checksum(found.values())


def test_sizes_of_a_smaller_file_and_unfit_data(tmp_path: Path) -> None:
    file = write(tmp_path / "question.jsonl")
    with pytest.raises(DataError, match="80 examples are asked for"):
        questions(file, splits={})
    with pytest.raises(DataError, match=r"no chat template\s+-> chat: plain"):
        questions(file, byte_tokenizer())
    plain = questions(file, byte_tokenizer(), chat="plain")["Shorter."]
    assert plain.prompt == "User: Write a poem.\nAssistant:" and plain.question == "Write a poem."
    with pytest.raises(DataError, match=r"data\.follow_ups: gives '(.|\n)*with a list"):
        questions(file, follow_ups="turns[1]")
    with pytest.raises(DataError, match="2 answers to 1 questions"):
        questions(file, follow_up_answers="right")
    for wrong, words in (
        ({"chat": None}, "follow_ups need chat"),
        ({"splits": {"train": 1}}, "both 0"),
        ({"choices": "category"}, "no choices"),
        ({"follow_ups": "turns["}, "no Jinja"),
        ({"follow_ups": None}, "follow_up_answers need"),
    ):
        with pytest.raises(ValidationError, match=words):
            questions(file, **wrong)


def test_later_turns_show_the_judge_the_conversation_as_published() -> None:
    """FastChat's judge_prompts.jsonl, single-v1-multi-turn and single-math-v1-multi-turn."""
    example = Example("<user>q1", "r1", question="q1", follow_ups=(FollowUp("q2", "r2"),))
    system, user = judge_messages(PLAIN, example, ["a1", "a2"])
    assert system["content"] == (
        "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the "
        "user question displayed below. Your evaluation should consider factors such as the helpfulness, relevance, "
        "accuracy, depth, creativity, and level of detail of the response. You evaluation should focus on the "
        "assistant's answer to the second user question. Begin your evaluation by providing a short explanation. Be as "
        "objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by "
        'strictly following this format: "[[rating]]", for example: "Rating: [[5]]".\n\n'
    )
    talk = (
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\nq1\n\n### Assistant A:\na1\n\n### User:\n"
        "q2\n\n### Assistant A:\na2\n\n<|The End of Assistant A's Conversation with User|>"
    )
    assert user["content"] == talk
    system, user = judge_messages(SHOWN, example, ["a1", "a2"])
    assert system["content"] == (
        "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the "
        "user question. Your evaluation should consider correctness and helpfulness. You will be given a reference "
        "answer and the assistant's answer. You evaluation should focus on the assistant's answer to the second "
        "question. Begin your evaluation by comparing the assistant's answer with the reference answer. Identify and "
        "correct any mistakes. Be as objective as possible. After providing your explanation, you must rate the "
        'response on a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: "Rating: '
        '[[5]]".\n\n'
    )
    assert user["content"] == (
        "<|The Start of Reference Answer|>\n\n### User:\nq1\n\n### Reference answer:\nr1\n\n### User:\nq2\n\n"
        f"### Reference answer:\nr2\n\n<|The End of Reference Answer|>\n\n\n{talk}"
    )
    first = judge_messages(SHOWN, example, ["a1"])[1]["content"]
    assert "[Question]\nq1\n" in first and "Reference Answer]\nr1\n" in first and "q2" not in first
    unknown = Example("q1", "", follow_ups=(FollowUp("q2"),))
    for given in (["a1"], ["a1", "a2"]):  # no reference is known: the prompts without
        assert judge_messages(SHOWN, unknown, given) == judge_messages(PLAIN, unknown, given)
    own = PLAIN.model_copy(update={"prompt": "{question} => {answer}"})
    assert judge_messages(own, example, ["a1", "a2"])[1]["content"] == (
        "### User:\nq1\n\n### Assistant A:\na1\n\n### User:\nq2 => a2"
    )


EXAMPLES = [
    Example("q1", "SECRET", follow_ups=(FollowUp("q2", "SECRET"), FollowUp("q3", "SECRET")), category="math"),
    Example("p1", "SECRET", follow_ups=(FollowUp("p2", "SECRET"),), category="stem"),
]


@pytest.mark.parametrize("chat", ["model", "plain"])
def test_each_turn_is_asked_after_the_own_answers(chat: Any) -> None:
    asked: list[list[str]] = []

    def generate(examples: Sequence[Example]) -> list[str]:
        assert all(item.response == "" and item.references == () and item.follow_ups == () for item in examples)
        asked.append([item.prompt for item in examples])
        return [f" said{len(asked)}{index} \n" for index in range(len(examples))]

    limits = {"max_length": 200, "max_new_tokens": 9}
    found = answer_turns(generate, chat_tokenizer(), EXAMPLES, chat, **limits)
    assert found == [("said10", "said20", "said30"), ("said11", "said21")]
    start, user, reply = ("<s>", "<user>", "<assistant>") if chat == "model" else ("", "User: ", "Assistant: ")
    last = f"{start}{user}q1\n{reply}said10\n{user}q2\n{reply}said20\n{user}q3\n{reply.strip()}"
    assert asked[2] == [last] and [len(prompts) for prompts in asked] == [2, 2, 1]
    assert asked[1][1] == f"{start}{user}p1\n{reply}said11\n{user}p2\n{reply.strip()}"
    assert "SECRET" not in str(asked)
    with pytest.raises(DataError, match=r"data\.max_length(.|\n)*can grow to"):
        answer_turns(generate, chat_tokenizer(), EXAMPLES, chat, **limits | {"max_new_tokens": 99})
    assert len(asked) == 3  # refused before anything is generated


def test_a_tokenizer_that_begins_texts_itself_begins_them_once() -> None:
    tokenizer = chat_tokenizer()
    assert chat_prompt(tokenizer, ["q"], [], "model") == "<s><user>q\n<assistant>"
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    text = chat_prompt(tokenizer, ["q"], [], "model")
    assert text == "<user>q\n<assistant>" and tokenizer(text).input_ids.count(1) == 1


def test_a_prompt_aware_adapter_sees_the_whole_conversation() -> None:
    model = Para(r=4).attach(build_tiny_llama(vocab_size=259, eos_token_id=None)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    tokenizer, new = chat_tokenizer(), 5

    def generate(examples: Sequence[Example]) -> list[str]:
        return generate_answers(model, tokenizer, examples, max_new_tokens=new, max_length=120, progress=False)

    (answers, _) = answer_turns(generate, tokenizer, EXAMPLES, "model", max_length=99, max_new_tokens=new)
    prompt = chat_prompt(tokenizer, EXAMPLES[0].questions[:2], answers[:1], "model")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    end = ids.shape[1] - 1

    def greedy(prompt_end: int) -> str:
        sequence = ids
        for _ in range(new):
            with torch.no_grad():
                logits = model(input_ids=sequence, prompt_end=torch.tensor([prompt_end])).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        return str(tokenizer.decode(sequence[0, end + 1 :], skip_special_tokens=True)).strip()

    assert answers[1] == greedy(end)
    first = len(tokenizer(chat_prompt(tokenizer, ["q1"], [], "model")).input_ids) - 1
    assert greedy(end) != greedy(first)  # the comparison can tell: vectors of the first turn's prompt


def test_means_of_turns_dialogues_and_categories(server: Judge, tmp_path: Path) -> None:  # noqa: F811
    grades = {"q1": 2, "q2": 4, "q3": 9, "p1": 7, "p2": 8}
    answers = [("A-q1", "A-q2", "A-q3"), ("A-p1", "A-p2")]

    def say(prompt: str) -> str:
        last = max(grades, key=lambda question: prompt.rfind(f"A-{question}"))
        return f"[[{grades[last]}]]" if grades[last] else "no"

    server.say = say
    scores, judgements = judge_answers(server.settings(), answers, EXAMPLES, "t", tmp_path)
    assert {score.metric: score.scores for score in scores} == {
        "judge's grade": (5.0, 7.5),
        "judge's grade, turn 1": (2.0, 7.0),
        "judge's grade, turn 2": (4.0, 8.0),
        "judge's grade, turn 3": (9.0,),
        "judge's grade, math": (5.0,),
        "judge's grade, stem": (7.5,),
    }
    assert [(item.turn, item.grade, item.answer) for item in judgements][2:4] == [(3, 9.0, "A-q3"), (1, 7.0, "A-p1")]
    grades["p2"] = 0
    scores, judgements = judge_answers(server.settings(model="k"), answers, EXAMPLES, "t", tmp_path)
    assert scores[0].scores == (5.0, 7.0) and scores[2].scores == (4.0,)
    assert unparsed_note(judgements) == ("The judge gave no grade for 1 of 5 answers, left out: 1 (turn 2).",)
    with pytest.raises(DataError, match="one for each turn"):
        judge_answers(server.settings(), [("a",), ("b", "c")], EXAMPLES, "", tmp_path)


def small(recipe: dict[str, Any], file: Path, address: str) -> dict[str, Any]:  # noqa: F811
    """The recipe on MT-Bench: nothing to train on."""
    del recipe["steps"][1:]
    recipe["data"] = {"preset": "mt_bench", "source": str(file), "chat": "plain", "splits": {"test": 3}}
    recipe["evaluate"] = {
        "task": {"max_new_tokens": 4, "judge": {"endpoint": address, "model": "j"}},
        "profile": None,
    }
    return recipe


def test_a_recipe_on_the_preset(recipe: dict[str, Any], server: Judge, tmp_path: Path) -> None:  # noqa: F811
    server.say = lambda prompt: "[[6]]" if "Conversation with User" in prompt else "[[3]]"
    raw = small(recipe, write(tmp_path / "question.jsonl"), server.address)
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, raw)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    for stage in report.stages:
        values = {score.metric: score.value for score in stage.texts}
        assert values["judge's grade, turn 1"] == 3 and values["judge's grade, turn 2"] == 6
        assert values["judge's grade"] == values["judge's grade, math"] == 4.5 and len(stage.judgements) == 6
    asked = [request["messages"][-1]["content"] for request in server.requests]
    assert any("### Reference answer:\nFOUR" in text for text in asked) and not any("ROSES" in text for text in asked)
    page = (out / "report.md").read_text()
    assert "judge's grade, turn 2" in page and "train" in page


def test_what_does_not_fit_dialogues_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    file = write(tmp_path / "question.jsonl")
    train = recipe["steps"][1]
    raw = small(recipe, file, "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"steps\[1\]: .*data\.splits\.train is 0"):
        parse_recipe(raw | {"steps": [*raw["steps"], train]})
    for task in ({"judge": None}, {**raw["evaluate"]["task"], "metrics": ["f1"]}):
        with pytest.raises(ConfigError, match=r"evaluate\.task: a judge, and no metric"):
            parse_recipe(raw | {"evaluate": {"task": task}})
    with pytest.raises(ConfigError, match=r"judge\.endpoint"):  # the preset wants a judge
        parse_recipe(raw | {"evaluate": {}})
    assert parse_recipe(raw | {"evaluate": {"task": None}}).evaluate.task is None
    assert parse_recipe(raw).evaluate.task.judge.reference
