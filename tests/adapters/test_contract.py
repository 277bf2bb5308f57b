"""The contract of tests/adapters/contract.py, for every registered adapter."""

from __future__ import annotations

import pytest

from compress_peft.adapters import ADAPTERS
from tests.adapters.contract import LINES, cases, label, outcome

LESS = {
    "nf4": ("start", "learn", "reload", "merge", "checkpointing"),
    "rtn": ("learn", "merge"),
    "shrunk": ("start", "learn"),
}
"""The lines that run on other backbones than dense here; `python -m benchmarks.adapters` runs all, and 2:4 too."""


def expected(line: str, method: str, settings: dict, kind: str) -> str:
    adapter = ADAPTERS.create(method, **settings)
    if kind in ("nf4", "rtn") and adapter.needs_dense():
        return "refused"
    if kind == "nf4" and method == "qa_lora":
        return "refused"
    if method == "alphatuning" and kind != "rtn":
        return "refused"  # it trains the scales of integer codes
    if line == "bfloat16" and method == "ln_tuning":
        return "refused"
    if line == "merge":
        mergeable = "dense" in adapter.merge_policies and "pfeiffer" not in str(settings)  # one of `layers`
        return "pass" if mergeable else "refused"
    return "pass"


@pytest.mark.parametrize("kind", ["dense", *LESS])
@pytest.mark.parametrize(("method", "settings"), [pytest.param(*case, id=label(*case)) for case in cases()])
def test_contract(method, settings, kind):
    found = {line: outcome(line, method, settings, kind) for line in LINES if line in LESS.get(kind, LINES)}
    assert {line: result.partition(":")[0] for line, result in found.items()} == {
        line: expected(line, method, settings, kind) for line in found
    }
    assert all(result == "pass" or len(result) > 30 for result in found.values())  # a refusal has a reason


def test_every_adapter_is_in_the_contract():
    assert {method for method, _ in cases()} == set(ADAPTERS)
