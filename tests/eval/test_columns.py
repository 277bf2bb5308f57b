"""Cells of the tables: what is told of a change, and of one from nothing."""

from __future__ import annotations

import pytest

from eval.columns import COLUMNS, table_rows
from eval.costs import Storage
from eval.records import Fidelity, StageRecord


def stage(kl: float, agreement: float = 1.0, codes: int = 0) -> StageRecord:
    found = Fidelity(
        kl=kl,
        low=kl / 2,
        high=kl * 2,
        block_kl=(kl, kl),
        token_agreement=agreement,
        tokens=8,
        continued=agreement,
        prompts=2,
        new_tokens=4,
        protocol="",
        text_sha256="",
    )
    return StageRecord(name="s", fidelity=found, storage=Storage(codes=codes))


def cells(*stages: StageRecord) -> list[list[tuple[str, str, str, str]]]:
    """KL, same token and weights of each stage: text, interval, change, verdict."""
    columns = [column for column in COLUMNS if column.label in ("KL to original, nats", "Same token", "Weights, MB")]
    rows = table_rows([f"{i}" for i in range(len(stages))], stages, columns)
    return [[(cell.text, cell.interval, cell.change, cell.verdict) for cell in row.cells] for row in rows]


@pytest.mark.parametrize("itself", [0.0, 3e-9])
def test_a_change_from_nothing_is_not_told_in_percent(itself: float) -> None:
    first, near, far = cells(stage(itself), stage(0.00004), stage(0.25, 0.75, 10**6))
    assert first[0] == ("0", "", "", "")
    assert near[0] == ("4e-05", "2e-05 to 8e-05", "", "") and far[0] == ("0.2500", "0.12 to 0.5", "", "")
    assert cells(stage(0.0), stage(0.0, 0.99999))[1][1][2] == "+0.0 pts"
    assert far[1] == ("75.0%", "", "-25.0 pts", "worse")  # points need no reference to divide by
    assert near[2][2:] == far[2][2:] == ("", "")


def test_against_a_stage_that_has_some() -> None:
    _, worse, better = cells(stage(0.1, codes=100), stage(0.15, codes=99), stage(0.05, codes=120))
    assert worse[0][2:] == ("+50%", "worse") and better[0][2:] == ("-50%", "better")
    assert better[2][2:] == ("+20%", "worse") and worse[2][2:] == ("-1.0%", "better")
