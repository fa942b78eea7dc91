import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from torch import distributed as dist
from torch import nn

import mnp_fast
from benchmarks import (
    agreement,
    chart,
    communication,
    cuda,
    layers,
    machine,
    roofline,
    run,
    scaling,
    zoo,
)
from benchmarks.timing import OURS, Case, measure
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.plots import PRUNED

from .commands import call
from .models import randomize

ROOT = Path(roofline.__file__).parents[1]
SUITES = [suite.value for suite in run.Suite]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suite", SUITES)
def test_suite_runs(suite, tmp_path, benchmark):
    file = tmp_path / f"{suite}.json"
    options = "--suite", suite, "--quick", "--rounds", 1, "--json", file
    result = benchmark.pedantic(call, (run.main, *options), rounds=1)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert not any(row.get("wrong") for row in rows)
    cases = {row["case"] for row in rows}
    assert {row["case"] for row in rows if row["by"].startswith(OURS) and "ratio" in row} == cases
    for row in rows:
        assert "values" in row or row["note"]  # none is left out without a reason


@pytest.mark.parametrize("suite", run.Suite)
def test_stored_figures_are_printed_alone(suite, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("something was timed"))
    result = call(run.main, "--suite", suite.value, "--stored")
    assert result.exit_code == 0, result.output
    stored = json.loads((run.RESULTS / f"{suite.value}.json").read_text())
    assert stored["machine"].split(",")[0] in result.output.replace("\n", " ")
    assert result.output.count("│ mnp_fast ") >= 1


def test_stored_agreement_is_that_of_the_page():
    result = call(agreement.main, "--stored")
    assert result.exit_code == 0, result.output
    page = (Path(run.__file__).parent.parent / "docs" / "statistics.md").read_text()
    for kind, signed, absolute, found in json.loads(agreement.FIGURES.read_text())["rows"]:
        assert found in result.output
        cells = (text.replace(", ", " to ").replace("-", "−") for text in (signed, absolute))
        assert f"| `{kind}` | {' | '.join(cells)} | {found} |" in page


def test_stored_figures_need_a_suite():
    result = call(run.main, "--stored")
    assert result.exit_code == 2
    assert "--stored needs --suite NAME" in result.output


def test_figures_that_are_not_stored_are_named(tmp_path):
    result = call(run.main, "--suite", "stats", "--stored", "--results", tmp_path)
    assert result.exit_code == 2
    assert "--results has no figures of stats" in result.output


def test_cases_of_a_gpu_are_right():
    """The same cases on the CPU, where nothing is captured."""
    rows = [row for case in cuda.cases(True, "cpu") for row in measure(case, 1, time.time, {})]
    assert not any(row.wrong for row in rows)
    assert len({row.case for row in rows}) == 9
    assert {row.note for row in rows if row.by == cuda.TRITON} == {
        "x must be on a CUDA device, not on cpu"
    }
    result = call(run.main, "--suite", "step", "--device", "cuda")
    assert "give either --suite NAME or --device cuda" in result.output


def test_without_a_device_a_benchmark_of_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call(run.main, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda needs a CUDA device" in result.output


def test_without_a_device_the_script_says_so(tmp_path):
    script, report = ROOT / "benchmarks" / "gpu.sh", tmp_path / "report.md"
    for python, why in (
        (
            sys.executable,
            f"torch {re.escape(torch.__version__)} (has no CUDA|finds no CUDA device)",
        ),
        ("/no/python", "/no/python does not run"),
    ):
        environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            ["bash", script, report], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert re.search(f"needs a CUDA device, torch for CUDA and nvcc: {why}\n", done.stderr)
        assert not report.exists()


def test_no_case_is_begun_after_the_time():
    cases = [case_of(0.0) for _ in range(3)]
    assert list(run.begun_within(None, iter(cases))) == cases
    assert list(run.begun_within(0, iter(cases))) == cases[:1]


def test_docs_have_the_modelled_bytes():
    text = (ROOT / "docs" / "gpu.md").read_text()
    for table in (roofline.rows(), roofline.product_rows()):
        assert roofline.page(table) in text


def case_of(error, limit=1e-5, **given):
    exact = torch.ones(4, dtype=torch.float64)
    return Case(
        "case",
        {"peer": lambda: (exact,), OURS: lambda: (exact + error,), f"{OURS} b": lambda: (exact,)},
        (exact,),
        limit,
        **given,
    )


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_wrong_result_gets_no_ratio(error, monkeypatch):
    wrong = case_of(error)
    rows = measure(wrong, 2, iter(range(100)).__next__, {})
    assert [row.wrong for row in rows] == [False, True, False]
    assert [row.ratio for row in rows] == [None, None, 1.0]
    monkeypatch.setitem(run.SUITES, run.Suite.step, lambda quick: iter([wrong]))
    result = call(run.main, "--suite", "step", "--quick", "--rounds", 1)
    assert result.exit_code == 1
    assert "1 wrong" in result.output


def test_wrong_peer_is_no_peer():
    case = case_of(0.0)
    case.functions["faster and wrong"] = lambda: (torch.zeros(4),)
    ticks = iter([0, 4, 0, 2, 0, 2, 0, 1] * 2)
    rows = {row.by: row for row in measure(case, 1, ticks.__next__, {})}
    assert rows["faster and wrong"].wrong
    assert rows["faster and wrong"].to_ours is None
    assert rows[OURS].ratio == 2
    assert rows["peer"].to_ours == 2


def test_rates_and_shares():
    case = case_of(0.0, work={"peer": 6e9, OURS: 3e9}, unit="FLOP")
    rows = {row.by: row for row in measure(case, 1, iter(range(100)).__next__, {"FLOP": 4e9})}
    assert rows[OURS].rate == 3e9
    assert rows[OURS].share == 0.75
    assert rows[f"{OURS} b"].rate is None
    case.bounds = frozenset({"peer"})
    rows = {row.by: row for row in measure(case, 1, iter(range(100)).__next__, {"FLOP": 4e9})}
    assert rows[OURS].share == 0.5
    assert rows[OURS].ratio is None  # a bound is no peer


def test_heavy_cases_count_the_first_call():
    calls = []
    case = case_of(0.0, heavy=True, reading=lambda: float(len(calls)), metric="MiB")
    case.functions = {"peer": lambda: calls.append(1) or case.exact}
    assert measure(case, 11, iter(range(100)).__next__, {})[0].values == [1, 2, 3]


def test_uncompilable_peer_is_excluded_with_the_reason():
    def fail():
        raise RuntimeError("no compiler\nat all")

    case = case_of(0.0)
    layers.add_compiled(case, "compiled", fail)
    row = measure(case, 1, iter(range(100)).__next__, {})[-1]
    assert (row.by, row.note, row.values) == ("compiled", "RuntimeError: no compiler", [])


def test_nnpack_is_excluded_where_torch_does_not_use_it():
    [forward, *_] = layers.Layer(layers.Shape(4, 4, 4), 2).cases(quick=True)
    assert "NNPACK" in forward.excluded
    assert torch.backends.mkldnn.enabled


def test_machine_prints_its_peaks(monkeypatch):
    monkeypatch.setattr(machine, "PRODUCT", 64)
    monkeypatch.setattr(machine, "COPY", 2**20)
    result = call(machine.main)
    assert result.exit_code == 0
    assert "GFLOP/s" in result.output
    assert "GB/s" in result.output


def test_chart(tmp_path):
    rows = [
        {"case": "a", "by": "torch"},
        {"case": "a", "by": OURS, "ratio": 2.5},
        {"case": "a", "by": f"{OURS} direct", "ratio": 0.9},
        {"case": "b", "by": OURS, "ratio": 0.5},
        {"case": "c", "by": OURS, "wrong": True},
    ]
    (tmp_path / "layers.json").write_text(json.dumps({"quick": False, "rows": rows}))
    assert chart.bars(tmp_path / "layers.json") == [("a", 2.5), ("b", 0.5)]
    image = tmp_path / "images" / "chart.png"
    result = call(chart.main, "--results", tmp_path, "--image", image)
    assert result.exit_code == 0, result.output
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.stat().st_size < 150_000


def test_chart_shows_a_loss_among_many_gains_in_its_colour(tmp_path):
    gains = [{"case": f"{i}", "by": OURS, "ratio": 2 + i / 40} for i in range(80)]
    rows = [*gains, {"case": "b", "by": OURS, "ratio": 0.97}]
    (tmp_path / "layers.json").write_text(json.dumps({"quick": False, "rows": rows}))
    result = call(chart.main, "--results", tmp_path, "--image", tmp_path / "chart.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "chart.png") as picture:
        colours = picture.convert("RGB").getcolors()
    assert ImageColor.getrgb(PRUNED) in [colour for _, colour in colours]


def test_chart_of_quick_figures(tmp_path):
    (tmp_path / "layers.json").write_text(json.dumps({"quick": True, "rows": []}))
    result = call(chart.main, "--results", tmp_path, "--image", tmp_path / "chart.png")
    assert result.exit_code == 2
    assert "--quick" in result.output
    assert not (tmp_path / "chart.png").exists()


def test_chart_without_figures(tmp_path):
    result = call(chart.main, "--results", tmp_path)
    assert result.exit_code == 2
    assert "make bench" in result.output


DISTRIBUTED = Path(__file__).parents[1] / "docs" / "distributed.md"


@pytest.mark.parametrize("options", [{"samples": 500, "fill": 1}, {"samples": 5000, "fill": 32}])
def test_the_tables_of_the_docs_are_what_the_model_of_cost_gives(options, capsys):
    scaling.main(exchange=1.0, **options)
    assert capsys.readouterr().out in DISTRIBUTED.read_text()


def test_the_docs_have_what_is_exchanged(monkeypatch):
    def exchange(self, collective, *args, **kwargs):
        if collective is dist.all_gather:
            for received in args[0]:
                received.copy_(args[1])

    monkeypatch.setattr(communication.Processes, "_exchange", exchange)
    processes = communication.Counted(None)
    processes.size = processes.shards = 2
    assert communication.table(communication.count(processes)) in DISTRIBUTED.read_text()


def test_a_phase_scales_up_to_its_batch():
    assert scaling.step_time("fit", 500, 25, 0) == scaling.step_time("fit", 500, 100, 0) == 4
    assert scaling.step_time("expose", 10, 4, 0.5) == 2 * 3 + 0.5
    assert scaling.step_time("fit", 500, 8, 0, fill=10) == 4 * 10


class Zoo:
    """Networks in place of published ones."""

    def __init__(self, monkeypatch, tmp_path):
        self.networks = {}
        monkeypatch.setattr(zoo, "build", lambda entry: self.networks[entry.name]())
        monkeypatch.setattr(zoo, "PACKAGES", ("torch",))
        monkeypatch.setattr(zoo, "STORE", tmp_path / "zoo.json")
        monkeypatch.setattr(zoo, "ROOT", tmp_path)
        self.monkeypatch, self.page = monkeypatch, tmp_path / "docs" / "zoo.md"
        self.page.parent.mkdir()

    def run(self, **networks):
        self.networks = networks
        entries = [zoo.Entry(name, 16) for name in networks]
        self.monkeypatch.setattr(zoo, "FAMILIES", {"small": entries})
        result = call(zoo.main, "--json", zoo.STORE)
        return result.exit_code, json.loads(zoo.STORE.read_text())["rows"]


@pytest.fixture
def small_zoo(monkeypatch, tmp_path):
    return Zoo(monkeypatch, tmp_path)


def test_zoo(small_zoo):
    code, rows = small_zoo.run(
        norms=lambda: randomize(ResNet18(4)).double().eval(),
        none=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 2)).double(),
    )
    assert code == 0
    assert [row["outcome"] for row in rows] == ["exact", "refused"]
    assert rows[0]["layers"] == rows[0]["blocks"] == 20
    assert rows[0]["without"] == {"Linear": 1}
    assert "nothing to mask" in rows[1]["why"]
    assert call(zoo.main, "--page").exit_code == 0
    text = small_zoo.page.read_text()
    assert "2 architectures: 1 exact (1 with fused blocks), 1 refused, 0 wrong." in text
    assert text.count("\n| small | ") == 2


def test_zoo_tells_what_is_wrong(small_zoo, monkeypatch):
    def network():
        return randomize(ResNet18(4)).double().eval()

    def fails():
        raise RuntimeError("no such network")

    _, [row] = small_zoo.run(fails=fails)
    assert row["outcome"] == "wrong"
    assert row["why"] == "RuntimeError: no such network"
    monkeypatch.setattr(mnp_fast, "unwrap", lambda masked: network())
    code, [row] = small_zoo.run(network=network)
    assert code == 1
    assert row["outcome"] == "wrong"
    assert row["why"].startswith("unwrapped: ")
