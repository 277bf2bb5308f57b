"""Each preset on rows as its hub data set has them: prompts, answers, splits, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress_peft.data.build import TaskData, build_data
from compress_peft.data.preset import load_preset, preset_names
from compress_peft.data.settings import DataSettings
from compress_peft.errors import DataError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.training.settings import TrainingSettings
from eval.choices import evaluate_choices
from eval.text_metrics import score_answers
from pipelines.recipe import EvaluateSettings
from tests.conftest import build_tiny_llama

TOKENIZER = byte_tokenizer()
Rows = Callable[[int, int], list[dict[str, Any]]]


def boolq(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"question": f"is number {i} odd", "passage": f"About the number {i}.", "idx": i, "label": answer % 2}]


def copa(i: int, answer: int) -> list[dict[str, Any]]:
    return [
        {
            "premise": f"Man {i} broke his toe.",
            "choice1": "He got a hole in his sock.",
            "choice2": f"He dropped hammer {i} on his foot.",
            "question": "cause",
            "idx": i,
            "label": answer % 2,
        }
    ]


def rte(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"premise": f"House {i} is red.", "hypothesis": "A house is red.", "idx": i, "label": answer % 2}]


def cb(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"premise": f"House {i} is red.", "hypothesis": "It is blue.", "idx": i, "label": answer % 3}]


def squad(i: int, answer: int) -> list[dict[str, Any]]:
    texts = [f"word{answer}", f"the word{answer} itself"]
    answers = {"text": texts, "answer_start": [0, 0]}
    return [{"id": str(i), "title": "T", "context": f"Context {i}.", "question": "Which word?", "answers": answers}]


def coqa(i: int, answer: int) -> list[dict[str, Any]]:
    def said(last: str) -> dict[str, Any]:
        return {"input_text": [f"cat {i}", last], "span_start": [0, 0]}

    return [
        {
            "id": str(i),
            "story": f"Story {i} of a cat.",
            "questions": {"input_text": ["Who?", "What colour?"], "turn_id": [1, 2]},
            "answers": said(f"shade{answer}"),
            "additional_answers": {"0": said(f"shade{answer}"), "1": said(f"a shade{answer}")},
        }
    ]


def e2e(i: int, answer: int) -> list[dict[str, Any]]:
    meaning = f"name[Punter {i}], food[Thai]"
    texts = (f"Punter {i} serves dish{answer} .", f"Eat dish{answer} at Punter {i} .")
    return [{"meaning_representation": meaning, "human_reference": text} for text in texts]


def webnlg(i: int, answer: int) -> list[dict[str, Any]]:
    triples = [[f"Town_{i} | country | Chile", f"Town_{i} | mayor | Ann"]]
    texts = [f"Town {i} is told{answer} of .", f"Of town {i} they told{answer} ."]
    record = {"category": "City", "modified_triple_sets": {"mtriple_set": triples}}
    return [{**record, "lex": {"text": texts, "lid": ["1", "2"]}}, {**record, "lex": {"text": [], "lid": []}}]


def cnn_dailymail(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"article": f"Long news {i}.", "highlights": f"Short{answer} .\nNews {i} .", "id": str(i)}]


def gsm8k(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### 7{answer}"}]


def mmlu(i: int, answer: int) -> list[dict[str, Any]]:
    choices = [f"{i}", "two", "three", "four"]
    return [{"question": f"Which is {i}?", "subject": "high_school_math", "choices": choices, "answer": answer % 4}]


def ultrachat(i: int, answer: int) -> list[dict[str, Any]]:
    return [{"id": str(i), "data": [f"Hello {i}?", f"Greetings {i}.", "And then?", f"Then{answer}."]}]


ROWS: dict[str, Rows] = {
    rows.__name__: rows
    for rows in (boolq, copa, rte, cb, squad, coqa, e2e, webnlg, cnn_dailymail, gsm8k, mmlu, ultrachat)
}
NAMES = {"webnlg": {"validation": "dev"}, "mmlu": {"train": "dev"}}
"""What hub data sets call their splits otherwise."""

PROMPTS = {  # of record 0, what follows the prompt, and all that counts as right or may be chosen
    "boolq": (
        'identify if the answer is "yes" or "no".\nPassage: About the number 0.\nQuestion: is number 0 odd?\nAnswer:',
        (" no", " yes"),
    ),
    "copa": (
        "Premise: Man 0 broke his toe.\nQuestion: cause\nAlternative 1: He got a hole in his sock.\n"
        "Alternative 2: He dropped hammer 0 on his foot.\nAnswer:",
        (" He got a hole in his sock.", " He dropped hammer 0 on his foot."),
    ),
    "rte": ("\nPremise: House 0 is red.\nHypothesis: A house is red.\nAnswer:", (" entailment", " not_entailment")),
    "cb": (
        "neutral to the premise.\nPremise: House 0 is red.\nHypothesis: It is blue.\nAnswer:",
        (" entailment", " contradiction", " neutral"),
    ),
    "squad": ("Context: Context 0.\nQuestion: Which word?\nAnswer:", (" word0", " the word0 itself")),
    "coqa": (
        "Story 0 of a cat.\n\nQ: Who?\nA: cat 0\nQ: What colour?\nA:",
        (" shade0", " shade0", " a shade0"),
    ),
    "e2e": (
        "Restaurant: name[Punter 0], food[Thai]\nDescription:",
        (" Eat dish0 at Punter 0 .", " Punter 0 serves dish0 ."),
    ),
    "webnlg": (
        "Facts:\nTown_0 | country | Chile\nTown_0 | mayor | Ann\nText:",
        (" Of town 0 they told0 .", " Town 0 is told0 of ."),
    ),
    "cnn_dailymail": ("summarize: Long news 0.\nsummary:", (" Short0 .\nNews 0 .",)),
    "gsm8k": ("Question: What is 0 + 1?\nAnswer:", (" It is one more.\n#### 70",)),
    "mmlu": (
        "questions (with answers) about high school math.\n\nWhich is 0?\nA. 0\nB. two\nC. three\nD. four\nAnswer:",
        (" A", " B", " C", " D"),
    ),
    "ultrachat": (
        "User: Hello 0?\nAssistant: Greetings 0.\nUser: And then?\nAssistant:",
        (" Then0.",),
    ),
}


def write(folder: Path, preset: str, answer: Callable[[int], int] = lambda i: i, splits: str = "train validation test"):
    """24 training, 6 validation and 6 test records under the names that the hub has."""
    folder.mkdir(exist_ok=True)
    start = {"test": range(6), "validation": range(6, 12), "train": range(12, 36)}
    for split in splits.split():
        rows = [row for i in start[split] for row in ROWS[preset](i, answer(i))]
        path = folder / f"{NAMES.get(preset, {}).get(split, split)}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    return folder


def build(folder: Path, preset: str, **changes: Any) -> TaskData:
    return build_data(DataSettings(preset=preset, source={"path": str(folder)}, **changes), TOKENIZER)


def test_there_are_rows_for_every_preset() -> None:
    assert sorted([*ROWS, "mt_bench"]) == preset_names()  # which has no splits, and tests of its own


@pytest.mark.parametrize("preset", sorted(ROWS))
def test_prompt_answers_splits_and_scores(preset: str, tmp_path: Path) -> None:
    data = build(write(tmp_path / "a", preset), preset)
    turns = 2 if preset in ("coqa", "ultrachat") else 1
    references = 2 if preset in ("squad", "e2e", "webnlg") else 1
    last = [example for example in data.test if PROMPTS[preset][0] in example.prompt]
    assert len(last) == 1 and last[0].prompt.endswith(PROMPTS[preset][0])
    assert (last[0].choices or last[0].references or (last[0].response,)) == PROMPTS[preset][1]
    assert [len(part) // turns for part in (data.train, data.validation, data.test)][1:] == [6, 6]
    assert len({example.prompt for example in data.train}) == 24 * turns
    if preset == "coqa":  # several people answered; the first question has one answer in other words
        assert len(data.train) == 24 * 3 and all(not example.references for example in data.train)
    else:
        assert len(data.train) == 24 * turns * references
    facts = data.facts()["details"]
    assert facts["preset"] == f"{preset}, version {load_preset(preset).version}"
    assert facts.get("records_without_examples", 0) == (36 if preset == "webnlg" else 0)

    evaluate = EvaluateSettings.model_validate(load_preset(preset).evaluate)
    assert evaluate.task is not None
    if last[0].choices:
        model = build_tiny_llama(vocab_size=320, max_position_embeddings=512)
        accuracy, _ = evaluate_choices(model, TOKENIZER, data.test, progress=False)
        assert len(accuracy.references) == 6 and set(accuracy.references) == {item.response for item in data.test}
        return
    assert evaluate.task.metrics is not None
    for answer, perfect in ((lambda item: item.right_answers[-1], True), (lambda item: "zebra", False)):
        accuracies, texts = score_answers(list(map(answer, data.test)), data.test, evaluate.task.metrics, preset)
        values = [score.value for score in texts] + [score.correct / len(data.test) for score in accuracies]
        assert values and all((value > 0.95) if perfect else (value < 0.05) for value in values)


@pytest.mark.parametrize("preset", sorted(ROWS))
def test_no_prompt_depends_on_its_answer(preset: str, tmp_path: Path) -> None:
    one = build(write(tmp_path / "a", preset), preset).test
    two = build(write(tmp_path / "b", preset, lambda i: i + 1), preset).test
    assert [example.prompt for example in one] == [example.prompt for example in two]
    changed = [first.response != second.response for first, second in zip(one, two, strict=True)]
    assert sum(changed) == 6  # of a dialogue, the last answer


@pytest.mark.parametrize("preset", sorted(ROWS))
def test_sections_are_valid_for_their_recipe(preset: str) -> None:
    found = load_preset(preset)
    settings = DataSettings(preset=preset)
    assert settings.splits.separate and settings.overlap == "drop"
    EvaluateSettings.model_validate(found.evaluate)
    TrainingSettings.model_validate(found.training)
    if settings.choices is None:
        assert found.evaluate["task"]["max_new_tokens"] < settings.max_length


def test_halves_of_the_validation_set_are_for_validation_and_test(tmp_path: Path) -> None:
    data = build(write(tmp_path / "a", "boolq", splits="train validation"), "boolq")
    assert [len(data.train), len(data.validation), len(data.test)] == [24, 3, 3]
    text = "{question}"
    seen = build(tmp_path / "a", "boolq", prompt=text)
    assert {example.prompt for example in seen.validation} == {f"is number {i} odd" for i in (6, 7, 8)}
    with pytest.raises(DataError, match=r"data\.splits\.train\.from: has no records"):
        build(write(tmp_path / "b", "squad", splits="train validation"), "squad")  # less than its 1,000


def test_own_keys_override_the_preset(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "boolq")
    data = build(folder, "boolq", prompt="{passage} {question}?", splits={"train": 5}, truncate={"passage": 5})
    assert len(data.train) == 5 and len(data.test) == 6
    assert data.test[0].prompt.startswith("About is number") and data.test[0].choices == (" no", " yes")
    renamed = build(folder, "boolq", fields={"verdict": "'yes' if label else 'no'", "said": "1"}, max_length=99)
    assert {example.response for example in renamed.test} == {" no", " yes"}
    keys = {"train": "from", "validation": "from", "test": "source"}
    parts = {name: {key: str(folder / f"{name}.jsonl")} for name, key in keys.items()}
    own = build_data(DataSettings(preset="boolq", splits=parts), TOKENIZER)
    assert own.test == build(folder, "boolq").test


def test_one_file_is_divided_by_sizes(tmp_path: Path) -> None:
    file = write(tmp_path / "a", "gsm8k") / "train.jsonl"
    data = build(file, "gsm8k", splits={"train": 12, "validation": 4, "test": 8})
    assert [len(data.train), len(data.validation), len(data.test)] == [12, 4, 8]
    with pytest.raises(ValidationError, match="has no splits of its own: give their sizes"):
        build(file, "gsm8k")
    with pytest.raises(ValidationError, match=r"has no split train\[500:\]"):
        build(file, "gsm8k", splits={name: {"from": "train[500:]"} for name in ("train", "validation", "test")})


def test_an_unknown_preset_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValidationError, match=r'no preset "sqad": did you mean "squad".*boolq.*webnlg'):
        DataSettings(preset="sqad")


def test_prompts_of_the_test_set_are_dropped_from_training(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "e2e")
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + "\n".join(json.dumps(row) for i in (0, 6) for row in e2e(i, 99)))
    data = build(folder, "e2e")
    assert data.facts()["details"]["shared_with_other_splits_dropped"] == 2
    assert not {item.prompt for item in data.train} & {item.prompt for item in (*data.test, *data.validation)}
    with pytest.raises(DataError, match=r"test\.from: 1 of its 6 prompts stand in the train split(.|\n)*overlap: drop"):
        build(folder, "e2e", overlap="refuse")


def test_hub_rows_of_other_releases(tmp_path: Path) -> None:
    """google/boolq says answer: true; stanfordnlp/coqa has a list of questions; ultrachat_200k has messages."""
    for preset, record in {
        "boolq": lambda i: {"question": f"q{i}", "passage": "p", "answer": i % 2 == 0},
        "coqa": lambda i: {"story": f"s{i}", "questions": ["a?", "b?"], "answers": {"input_text": ["x", f"y{i}"]}},
        "ultrachat": lambda i: {
            "messages": [
                {"role": role, "content": f"{role}{i}"} for role in ("system", "user", "assistant", "user", "assistant")
            ]
        },
    }.items():
        folder = tmp_path / preset
        folder.mkdir()
        for start, name in enumerate(("train", "validation", "test")):
            rows = [record(i) for i in range(10 * start, 10 * start + 4)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        test = build(folder, preset).test
        if preset == "boolq":
            assert {(item.prompt[-12:], item.response) for item in test} >= {("q20?\nAnswer:", " yes")}
        elif preset == "coqa":
            assert {item.response for item in test} == {" x", *(f" y{i}" for i in range(20, 24))}
        else:
            assert {item.response for item in test} == {f" assistant{i}" for i in range(20, 24)}
            assert all("system" not in item.prompt for item in test)
