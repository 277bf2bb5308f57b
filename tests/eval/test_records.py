from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from eval.costs import Storage, Timing
from eval.records import Accuracy, Perplexity, StageRecord


def test_wilson_interval_of_a_known_case() -> None:
    """10 of 20 at 95%: 0.2993 to 0.7007 (Brown, Cai and DasGupta 2001's formula)."""
    accuracy = Accuracy.from_answers("choice", ["a"] * 20, ["a"] * 10 + ["b"] * 10)
    assert accuracy.value == 0.5
    assert (accuracy.low, accuracy.high) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_no_examples_and_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="0 predictions for 0"):
        Accuracy.from_answers("choice", [], [])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        Accuracy.from_answers("choice", ["a"], ["a", "b"])


def test_json_round_trip_with_infinity() -> None:
    stage = StageRecord(
        name="original",
        accuracies=(Accuracy.from_answers("choice", ["a", "b"], ["a", "a"]),),
        perplexity=Perplexity(
            value=3.0,
            low=0.0,
            high=math.inf,
            tokens=7,
            block_size=8,
            block_nll=(math.log(3.0),),
            protocol="p",
            text_sha256="0",
        ),
        storage=Storage(codes=10, scales=2, embeddings=5),
    )
    text = stage.model_dump_json()
    assert StageRecord.model_validate_json(text) == stage
    assert "Infinity" in text and stage.storage is not None and stage.storage.memory_bytes == 17


def test_records_are_frozen_and_strict() -> None:
    timing = Timing.from_values([3.0, 1.0, 2.0])
    assert (timing.median, timing.min, timing.max) == (2.0, 1.0, 3.0)
    with pytest.raises(ValidationError):
        timing.median = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Storage.model_validate({"code": 1})
