"""The teacher's scores on disk: equal to the live teacher's, resumable, and damage is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress_peft.errors import CorruptFile
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.training.batches import Batch, collate
from compress_peft.training.distillation import LOSSES, Objective, Teacher, TeacherCache
from compress_peft.training.distillation import cache as cache_module
from compress_peft.training.distillation.cache import position_bytes
from compress_peft.training.distillation.events import Events
from compress_peft.training.distillation.generate import GenerationSettings, Responses, generate
from compress_peft.training.distillation.rows import batch_keys, row_key, text_rows
from tests.conftest import build_tiny_llama

ROWS = [([5 + i, 6, 7][: 1 + i % 3], [8 + i, 9, 2][: 1 + i % 2]) for i in range(11)]


def make(folder: Path, top_k: int = 100, **identity: object) -> TeacherCache:
    return TeacherCache(folder, ROWS, {"teacher": "a", **identity}, top_k)


def fill(cache: TeacherCache, teacher: Teacher, batch_size: int = 3) -> None:
    cache.fill(teacher.events, 0, batch_size, torch.device("cpu"))
    cache.open()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 4)


@pytest.mark.parametrize("method", ["forward_kl", "reverse_kl", "js", "skewed_kl"])
def test_the_cached_loss_is_the_live_loss(tmp_path: Path, method: str) -> None:
    student, model = build_tiny_llama(seed=1), build_tiny_llama(seed=2)
    cache = make(tmp_path)
    fill(cache, Teacher(model, 128, 2.0, 100))
    large = make(tmp_path / "large", 127)
    fill(large, Teacher(model, 128, 2.0, 127))
    loss = [LOSSES.create(method, temperature=2)]
    batch = collate([ROWS[7], ROWS[0], ROWS[10], ROWS[2]], 0)  # another order and other padding than in the cache
    cached = Objective(loss, cache, 128, 2.0)(student, batch).item()
    live = Objective(loss, Teacher(model, 128, 2.0, 100), 128, 2.0)(student, batch).item()
    full = Objective(loss, Teacher(model, 128, 2.0, None), 128, 2.0)(student, batch).item()
    assert cached == pytest.approx(live, rel=1e-5)
    assert 0.01 < cached < full  # the tokens of a random model are all likely: dropping 28 of 128 is felt
    assert Objective(loss, large, 128, 2.0)(student, batch).item() == pytest.approx(full, rel=1e-5)


def test_only_positions_that_predict_a_target_are_stored_once(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, [*ROWS, *ROWS], {}, 10)
    fill(cache, Teacher(build_tiny_llama(), 128, 1.0, 10))
    positions = sum(len(response) for _, response in ROWS)
    overhead = cache.size() - positions * position_bytes(10)
    assert len(cache.rows) == 11 and cache.shards == 3 and 0 < overhead < 3 * 600


def test_a_killed_run_goes_on_with_the_first_missing_shard(tmp_path: Path) -> None:
    teacher = Teacher(build_tiny_llama(), 128, 1.0, 100)
    whole, cut = make(tmp_path / "whole"), make(tmp_path / "cut")
    fill(whole, teacher)
    calls = []

    def dies(batch: Batch) -> Events:
        calls.append(len(batch.targets))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return teacher.events(batch)

    with pytest.raises(KeyboardInterrupt):
        cut.fill(dies, 0, 3, torch.device("cpu"))
    (tmp_path / "cut" / "shard-00001.part").write_bytes(b"half")
    assert cut.missing() == [1, 2]
    with pytest.raises(CorruptFile, match="shard-00001"):
        cut.open()
    fill(make(tmp_path / "cut"), teacher)
    for shard in range(3):
        assert cut.path(shard).read_bytes() == whole.path(shard).read_bytes()


def test_a_kill_while_a_shard_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.os, "fsync", killed)
    cache = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, Teacher(build_tiny_llama(), 128, 1.0, 100))
    assert cache.missing() == [0, 1, 2]


def test_damage_and_foreign_scores_are_refused(tmp_path: Path) -> None:
    teacher = Teacher(build_tiny_llama(), 128, 1.0, 100)
    fill(make(tmp_path), teacher)
    path = make(tmp_path).path(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])  # one bit
    with pytest.raises(CorruptFile, match=r"shard-00001.*\n?.*checksum"):
        make(tmp_path).open()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="shard-00001"):
        make(tmp_path).open()
    path.write_bytes(whole)
    make(tmp_path).open()
    others = [make(tmp_path, teacher="b"), make(tmp_path, 99), make(tmp_path, temperature=2)]
    others.append(TeacherCache(tmp_path, [*ROWS[1:], ROWS[0]], {"teacher": "a"}, 100))
    assert len({cache.key for cache in others} | {make(tmp_path).key}) == 5
    for other in others:
        with pytest.raises(CorruptFile, match="another teacher"):
            other.open()


def test_rows_are_found_by_their_tokens_and_the_start_of_the_response() -> None:
    assert batch_keys(collate(ROWS, 0)) == [row_key(*row) for row in ROWS]
    assert row_key([1, 2], [3]) != row_key([1], [2, 3]) != row_key([1], [3, 2])
    assert text_rows(torch.tensor([[1, 2, 3], [4, 5, 6]])) == [([1], [2, 3]), ([4], [5, 6])]


def test_responses_are_written_once_and_go_on_after_a_kill(tmp_path: Path) -> None:
    model, tokenizer = build_tiny_llama(vocab_size=300), byte_tokenizer()
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14], [15]]
    settings = GenerationSettings(max_new_tokens=4, batch_size=2)
    responses = Responses(tmp_path, prompts, settings, "a")
    assert responses.missing() == [0, 1, 2]
    responses.fill(model, tokenizer)
    alone = [generate(model, tokenizer, [prompt], settings)[0] for prompt in prompts]  # no padding
    assert responses.read() == alone and all(0 < len(response) <= 4 for response in alone)
    (tmp_path / "responses-00001.json").unlink()
    assert responses.missing() == [1]
    with pytest.raises(CorruptFile, match="responses-00001"):
        responses.read()
    responses.fill(model, tokenizer)
    assert responses.read() == alone
    with pytest.raises(CorruptFile, match="another teacher"):
        Responses(tmp_path, prompts, settings, "b").read()


class Writes:
    """Stands for a model: "writes" fixed tokens behind the prompts."""

    def __init__(self, written: list[list[int]]):
        self.written = torch.tensor(written)

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([self.written])

    def generate(self, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        assert settings["do_sample"] is False
        return torch.cat([input_ids, self.written], dim=1)


def test_a_response_ends_with_the_end_of_text() -> None:
    model = Writes([[7, 2, 0, 0], [7, 8, 9, 9], [2, 2, 2, 2]])
    written = generate(model, byte_tokenizer(), [[5], [6, 6], [2, 7]], GenerationSettings(max_new_tokens=4))
    assert written == [[7, 2], [7, 8, 9, 9], [2]]
