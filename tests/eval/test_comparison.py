"""Runs side by side: what is compared with what, what is warned of, and files that need nothing else."""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest

from compress_peft.errors import ConfigError, DataError
from eval.compare import main
from eval.comparison import compare_runs, read_runs, run_labels
from eval.comparison_page import write_comparison
from eval.costs import Latency, Memory, Storage, Timing
from eval.records import Accuracy, Machine, ModelFacts, RunReport, StageRecord
from eval.scatter import MEMORY, pareto_front, scatter_png


def stage(name: str, right: int, megabytes: float, speed: float, n: int = 100) -> StageRecord:
    return StageRecord(
        name=name,
        accuracies=(Accuracy.from_answers("choice", ["a"] * right + ["b"] * (n - right), ["a"] * n, "topics"),),
        storage=Storage(codes=int(megabytes * 1e6), disk_bytes=int(megabytes * 1.1e6)),
        memory=Memory(baseline_bytes=1, load_peak_bytes=2, run_peak_bytes=int(megabytes * 2e6), method="VmHWM"),
        latency=Latency(
            prefill_seconds=Timing.from_values([0.1]),
            decode_tokens_per_second=Timing.from_values([speed]),
            batch=1,
            prompt_tokens=8,
            new_tokens=8,
            repeats=1,
            threads=2,
            device="cpu",
            dtype="float32",
            load_seconds=1.0,
        ),
    )


def report(name: str, last: StageRecord, original: int = 50, cpu: str = "x", **recipe: object) -> RunReport:
    return RunReport(
        name=name,
        started=datetime(2026, 1, 1, tzinfo=UTC),
        finished=datetime(2026, 1, 2, tzinfo=UTC),
        command="",
        recipe={"name": name, "seed": 0, "steps": [recipe]},
        seed=0,
        machine=Machine(cpu=cpu, physical_cores=1, logical_cores=2, threads=2, ram_bytes=1, os="", python=""),
        model=ModelFacts(name="m"),
        stages=(stage("original", original, 400, 10), last),
    )


def test_rows_tests_and_what_differs() -> None:
    runs = [
        report("a", stage("exported", 90, 100, 30), bits=4),
        report("b", stage("exported", 52, 80, 35), bits=3),
    ]
    result = compare_runs(runs, ["a", "b"])
    assert [entry.name for entry in result.entries] == ["original", "a", "b"]
    assert result.differing == ("steps.0.bits",) and result.settings == (("a", ("4",)), ("b", ("3",)))
    assert result.setting_labels == ["Setting", "a", "b"] and result.setting_rows == [("steps.0.bits", "4", "3")]
    better, same = result.tests
    assert "+40.0 points" in better.accuracy and float(better.adjusted) < 1e-6
    assert "2 gained, 0 lost" in same.accuracy and float(same.adjusted) == pytest.approx(0.5)
    against = compare_runs(runs, ["a", "b"], against="b")
    assert against.entries[0].name == "b" and [test.name for test in against.tests] == ["original", "a"]
    everything = compare_runs(runs, ["a", "b"], stages="all")
    assert len(everything.entries) == 4
    only = compare_runs(runs, ["a", "b"], stages="exported")
    assert [entry.name for entry in only.entries] == ["a", "b"]


def test_different_originals_are_not_one_row() -> None:
    runs = [report("a", stage("end", 90, 100, 30)), report("b", stage("end", 52, 80, 35), original=40)]
    assert [entry.name for entry in compare_runs(runs, ["a", "b"]).entries] == ["a", "b"]


def test_what_does_not_compare_is_said() -> None:
    runs = [report("a", stage("end", 90, 100, 30)), report("b", stage("end", 52, 80, 35, n=60), cpu="y")]
    result = compare_runs(runs, ["a", "b"])
    told = " ".join(result.warnings)
    assert "different test examples" in told and "different machines" in told and "seed 0" in told
    assert result.tests[1].accuracy.startswith("not comparable") and result.tests[1].adjusted == "n/a"


def test_unknown_rows_and_stages() -> None:
    runs = [report("a", stage("exported", 90, 100, 30))]
    with pytest.raises(ConfigError, match="exported"):
        compare_runs(runs, ["a"], stages="exportet")
    with pytest.raises(ConfigError, match="original"):
        compare_runs(runs, ["a"], against="orginal")


def test_labels_are_as_long_as_they_must_be() -> None:
    assert run_labels([Path("/x/one/run"), Path("/x/two/run")]) == ["one/run", "two/run"]
    assert run_labels([Path("/x/one"), Path("/x/two")]) == ["one", "two"]


def test_pareto_front_against_its_definition() -> None:
    points = [(1, 1), (2, 3), (3, 2), (4, 4), (4, 5), (1, 0), (2, 3), (5, 5)]
    # low x is better, high y is better: (1, 1), (2, 3) twice, (4, 5)
    assert [points[i] for i in pareto_front(points, lower_x=True, lower_y=False)] == [(1, 1), (2, 3), (2, 3), (4, 5)]
    assert [points[i] for i in pareto_front(points, lower_x=False, lower_y=True)] == [
        (1, 0),
        (3, 2),
        (4, 4),
        (5, 5),
    ]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, right, size, speed in (("nf4_<para>", 90, 100, 30), ("int4_lora", 85, 80, 40)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(report(name, stage("end", right, size, speed), m=name).model_dump_json())
        folders.append(str(folder))
    out = tmp_path / "out"
    assert main([*folders, "--output", str(out)]) == 0
    assert "comparison.html" in capsys.readouterr().out
    page = (out / "comparison.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "<para>" not in page and "nf4_&lt;para&gt;" in page
    assert page.count("<svg") == 3 and 'data-value="90000000' not in page
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["Accuracy"] for row in rows] == [0.5, 0.9, 0.85]
    assert (out / "comparison.csv").read_text().splitlines()[2].startswith("nf4_<para>")
    assert r"nf4\_" in (out / "comparison.tex").read_text()
    for name in ("memory", "latency", "disk"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*folders, "--output", str(out)]) == 0  # an earlier comparison may be replaced
    assert main([*folders, folders[0], str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert "nowhere" in told and "given twice" in told
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years")
    assert main([*folders, "--output", str(tmp_path / "foreign")]) == 2
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]


def test_long_names_leave_room_for_the_plot() -> None:
    names, stages = ["n" * 90, "m" * 90], [stage("a", 90, 100, 30), stage("b", 80, 90, 40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # axes that collapse are only warned of
        assert scatter_png(names, stages, MEMORY) is not None


def test_every_table_scrolls_by_itself(tmp_path: Path) -> None:
    result = compare_runs([report(name, stage("end", 90, 100, 30), bits=name) for name in "ab"], ["a", "b"])
    page = write_comparison(result, tmp_path / "c").read_text()
    assert page.count("<table") == page.count('<div class="wide"><table') == 3 and ".wide { overflow-x: auto; }" in page


def test_unreadable_runs_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_runs([tmp_path / "a", tmp_path / "b"])
    assert len(caught.value.problems) == 2


def test_a_page_of_one_run(tmp_path: Path) -> None:
    result = compare_runs([report("a", stage("end", 90, 100, 30))], ["a"])
    assert write_comparison(result, tmp_path / "c").is_file()
