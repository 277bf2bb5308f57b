"""The judge against a local server: what it sees, how it is read, asked again, paid once, and where it is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress_peft.data.examples import Example
from compress_peft.errors import CorruptFile, MissingRequirement
from eval.chat import missing_chat
from eval.judge import JudgeSettings, judge_answers, judge_messages, parse_grade, unparsed_note
from eval.records import Judgement, RunReport, TextScore
from pipelines.run import EXIT_DONE, EXIT_USER, main
from tests.pipelines.conftest import recipe, write_recipe  # noqa: F401  a fixture

KEY = "sk-very-secret"
EXAMPLES = [Example(f"What is {n} plus {n}?", f" {2 * n}") for n in range(4)]
ANSWERS = ["nought", "two {answer}", "three [[10]]", "six"]


class Judge(ThreadingHTTPServer):
    """An endpoint that says what the test puts into `say`: a reply for each request, or a status or raw text first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.first: list[int | str] = []
        self.say = lambda prompt: "Good. Rating: [[7]]"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def settings(self, **more: Any) -> JudgeSettings:
        return JudgeSettings(**{"endpoint": self.address, "model": "j", "backoff": 0.01, "parallel": 1, **more})


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"path": self.path})
        self.server.keys.append(self.headers.get("Authorization"))
        first = self.server.first.pop(0) if self.server.first else 200
        text = first if isinstance(first, str) else f"no, {self.headers.get('Authorization')}"
        if first == 200:
            content = self.server.say(request["messages"][-1]["content"])
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
        self.send_response(first if isinstance(first, int) else 200)
        if first == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Judge() as judge:
        thread = threading.Thread(target=judge.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield judge
        judge.shutdown()
        thread.join()


def judged(
    settings: JudgeSettings, answers: list[str], examples: list[Example], task: str, cache: Path
) -> tuple[TextScore | None, tuple[Judgement, ...]]:
    """Of examples with one turn, which have one score."""
    scores, judgements = judge_answers(settings, [(answer,) for answer in answers], examples, task, cache)
    assert len(scores) <= 1
    return (scores[0] if scores else None), judgements


def seen(settings: JudgeSettings, example: Example, answer: str) -> str:
    system, user = judge_messages(settings, example, [answer])
    assert system == {"role": "system", "content": "You are a helpful assistant."} and user["role"] == "user"
    return user["content"]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]]", 7.5),
        ('It says "[[10]]" itself. Rating: [[2]]', 2.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Rating: 5", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_the_last_rating_on_the_scale_counts(reply: str, grade: float | None) -> None:
    assert parse_grade(reply) == grade


def test_the_judge_sees_question_answer_and_the_reference_only_when_asked() -> None:
    plain = JudgeSettings(endpoint="http://h/v1", model="j")
    example = Example("Q {reference}?", " 42", references=("42", "forty-two"))
    text = seen(plain, example, "A {question}")
    assert "[Question]\nQ {reference}?\n" in text and "Answer]\nA {question}\n[The End" in text and "42" not in text
    shown = seen(plain.model_copy(update={"reference": True}), example, "A")
    assert (
        "[The Start of Reference Answer]\n42\nforty-two\n[The End" in shown and "correctness and helpfulness" in shown
    )
    own = JudgeSettings(endpoint="http://h/v1", model="j", prompt='{"q": "{question}"} {answer}')
    assert seen(own, example, "A") == '{"q": "Q {reference}?"} A'


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "{question} only"}, "answer"),
        ({"prompt": "{question} {answer} {reference}"}, "reference: False"),
        ({"prompt": "{question} {anwser}"}, "anwser"),
        ({"endpoint": "localhost:8000"}, "http://localhost:8000/v1"),
        ({"endpoint": "http://me:secret@host/v1"}, "api_key_env"),
        ({"api_key_env": KEY}, "api_key_env"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JudgeSettings(**{"endpoint": "http://h/v1", "model": "j"} | wrong)


def test_grades_and_every_reply_are_kept_and_lost_ones_named(server: Judge, tmp_path: Path) -> None:
    grades = iter(["[[2]]", "I would rather not.", "[[10]]", "[[6]]"])
    server.say = lambda prompt: next(grades)
    score, judgements = judged(server.settings(), ANSWERS, EXAMPLES, "sums", tmp_path)
    assert score is not None and score.scores == (2.0, 10.0, 6.0) and score.value == 6.0 and score.n == 3
    assert score.low < 6.0 < score.high and not score.share
    assert [j.reply for j in judgements] == ["[[2]]", "I would rather not.", "[[10]]", "[[6]]"]
    assert unparsed_note(judgements) == ("The judge gave no grade for 1 of 4 answers, left out: 1.",)
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and (request["model"], request["temperature"]) == ("j", 0.0)
    server.say = lambda prompt: "hm"
    score, judgements = judged(server.settings(), ANSWERS, EXAMPLES, "sums", tmp_path / "other")
    assert score is None and "4 of 4" in unparsed_note(judgements)[0]


def test_a_subset_graded_is_no_pair_of_another(server: Judge, tmp_path: Path) -> None:
    server.say = lambda prompt: "none" if "nought" in prompt else "[[4]]"
    one, _ = judged(server.settings(), ANSWERS, EXAMPLES, "", tmp_path)
    other, _ = judged(server.settings(), ANSWERS[::-1], EXAMPLES, "", tmp_path)
    assert one is not None and other is not None and one.n == other.n
    assert one.references_sha256 != other.references_sha256


def test_replies_are_paid_once_also_after_a_failure(server: Judge, tmp_path: Path) -> None:
    server.first = [200, 200, 400]
    with pytest.raises(MissingRequirement, match="status 400"):
        judged(server.settings(), ANSWERS, EXAMPLES, "", tmp_path)
    before = len(server.requests)
    kept = len(list(tmp_path.glob("*.json")))
    assert 2 <= kept < 4
    first, _ = judged(server.settings(parallel=3), ANSWERS, EXAMPLES, "", tmp_path)
    assert len(server.requests) == before + 4 - kept
    again, _ = judged(server.settings(parallel=3), ANSWERS, EXAMPLES, "", tmp_path)
    assert again == first and len(server.requests) == before + 4 - kept
    judged(server.settings(model="other"), ["same"] * 2, EXAMPLES[:1] * 2, "", tmp_path)
    assert len(server.requests) == before + 4 - kept + 1  # equal questions are one
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(CorruptFile, match="delete it"):
        judged(server.settings(), ANSWERS, EXAMPLES, "", tmp_path)
        judged(server.settings(model="other"), ["same"], EXAMPLES[:1], "", tmp_path)


def test_asked_again_after_429_and_5xx_and_then_given_up(server: Judge, tmp_path: Path) -> None:
    server.first = [429, 503]
    score, _ = judged(server.settings(), ANSWERS[:1], EXAMPLES[:1], "", tmp_path)
    assert score is not None and score.value == 7.0 and len(server.requests) == 3
    server.first = [500] * 3
    with pytest.raises(MissingRequirement, match=r"3 attempts.*status 500"):
        judged(server.settings(retries=2), ANSWERS[1:2], EXAMPLES[1:2], "", tmp_path)
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("first", "words"),
    [(401, r"status 401.*no, Bearer \*\*\*"), ("<html>", "choices"), ('{"choices": []}', "choices"), (302, "302")],
)
def test_what_is_refused_at_once_tells_no_key(
    first: int | str, words: str, server: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.first = [first]
    with pytest.raises(MissingRequirement, match=words) as refusal:
        judged(server.settings(api_key_env="JUDGE_KEY"), ANSWERS[:1], EXAMPLES[:1], "", tmp_path)
    assert len(server.requests) == 1 and server.keys == [f"Bearer {KEY}"] and KEY not in str(refusal.value)


def test_what_is_missing_is_told_before_anything_is_loaded(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert missing_chat(server.settings(), "judge") == []
    assert ["JUDGE_KEY" in p.what for p in missing_chat(server.settings(api_key_env="JUDGE_KEY"), "judge")] == [True]
    away = JudgeSettings(endpoint="http://127.0.0.1:9/v1", model="j")
    assert ["cannot be reached" in problem.what for problem in missing_chat(away, "judge")] == [True]


def test_a_recipe_judges_every_stage(
    recipe: dict[str, Any],  # noqa: F811
    server: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.say = lambda prompt: f"[[4]] {KEY}" if "number 1 " not in prompt else "no"
    del recipe["steps"][1:]
    judge = {"endpoint": server.address, "model": "j", "api_key_env": "JUDGE_KEY", "reference": True}
    recipe["evaluate"] |= {"perplexity": None, "task": {"limit": 3, "max_new_tokens": 4, "judge": judge}}
    path, out = write_recipe(tmp_path, recipe), tmp_path / "out"
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert main([str(path), "--output", str(out)]) == EXIT_USER
    assert "JUDGE_KEY" in capsys.readouterr().err and not out.exists() and not server.requests
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert main([str(path), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    for stage in report.stages:
        assert stage.accuracy is not None and stage.accuracy.metric == "choice" and len(stage.judgements) == 3
        assert [score.metric for score in stage.texts] == ["judge's grade"] and stage.texts[0].value == 4.0
    assert len(report.stages) == 2 and set(server.keys) == {f"Bearer {KEY}"}
    assert "judge's grade" in (out / "report.md").read_text()
    written = [file for file in out.rglob("*") if file.is_file()]
    assert any(file.parent.name == "judge" for file in written)
    assert not [file for file in written if KEY.encode() in file.read_bytes()]
