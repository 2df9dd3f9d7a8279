"""Counts of `saeflow plan`, against the results of a run."""

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.config import load_params, validate
from saeflow.errors import UserError
from saeflow.needs import Needs, Rates, as_text, count_passes, one_pass
from saeflow.needs.ways import ways
from saeflow.plan import Plan
from saeflow.sources import hub

from .workflow.conftest import SYNTHETIC, Project, job_counts

ROOT = Path(__file__).parents[1]
RATES = ROOT / "benchmarks/results/rates.yaml"
SCALE = ROOT / "docs/scale"
BLOCK = 14336 * 3 * 4096 + 2 * 4096 * 4096 + 2 * 1024 * 4096
"""Weights of a block's products in docs/scale/model: MLP, queries and outputs, keys and values."""


def needs_of(params: dict[str, Any], rates: Path = RATES) -> Needs:
    plan = Plan(params)
    return Needs(plan, Rates.read(rates), count_passes(plan, Path("results")))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_pass_is_counted_as_by_hand() -> None:
    params = load_params(SCALE / "params.yaml")["sources"]["web"]
    one = one_pass(params, "web", Path("results"))
    length, width = params["context_length"], 4096
    attention = 2 * 2 * length * length * width  # scores and their mix, before the causal mask
    block = 2 * length * BLOCK + attention
    assert one.flops == 16 * block
    assert one.flops_whole == 32 * block + 2 * length * width * 128256
    assert one.rows == length - 1
    assert one.widths == {"blocks.15.resid_post": width}


@pytest.mark.parametrize(("tokens", "rows"), [("all", 65), ("cls", 1), ("patches", 64)])
def test_images_give_the_rows_that_are_kept(tokens: str, rows: int) -> None:
    params: Any = copy.deepcopy(load_params(ROOT / "params.yaml")["sources"]["scenes"])
    one = one_pass(params | {"tokens": tokens}, "scenes", Path("results"))
    assert one.rows == rows
    assert one.flops < one.flops_whole


def test_a_step_that_was_not_measured_costs_what_the_dearest_does() -> None:
    rates = Rates.read(RATES)
    assert rates.step_products("entmax", 3072) == rates.step_products("relu", 3072)
    assert rates.step_products("topk", 2000) == rates.steps["topk"][3072]


@pytest.mark.parametrize(
    "change",
    [
        {"product_gflops": None},
        {"job_s": 0},
        {"steps": 1},
        {"machine": 3},
        {"arithmetic": ["speed"]},
    ],
)
def test_rates_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RATES.read_text()) | change))
    with pytest.raises(UserError, match=r"rates\.yaml: .*expected"):
        Rates.read(path)


def test_a_model_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    params = load_params(ROOT / "presets/tiny.yaml")
    params["sources"]["smollm2"]["model"]["sha256"] = "0" * 64  # not a wheel whose sizes are known
    with pytest.raises(UserError, match=r"Run `snakemake --cores 1 .*provenance\.json` first"):
        count_passes(Plan(params), tmp_path)


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_planned_without_the_hub(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("planning reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub, "config_file", refuse)  # nor the hub's cache of this machine
    assert count_passes(Plan(load_params(preset)), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "synthetic",
        "synthetic-groups",
        "synthetic-windows",
        "synthetic-stream",
        "sparsemax-text",
        "sparsemax-text-stream",
        "softsae-vision",
    ],
)
def test_as_many_jobs_are_counted_as_snakemake_starts(name: str, tmp_path: Path) -> None:
    preset = name.removesuffix("-stream")
    params: Any = SYNTHETIC if "synthetic" in name else load_params(ROOT / f"presets/{preset}.yaml")
    if name == "sparsemax-text-stream":  # whose guided SAEs take a pass of their own
        params["stores"]["openwebtext"] |= {"window_rows": 250_000_000, "keep_windows": 2}
        params["runtime"]["extraction_jobs"] = 1
    if name.startswith("synthetic-"):
        params = copy.deepcopy(params)
    if name == "synthetic-groups":
        params["runtime"]["saes_per_job"] = 2
    elif name.startswith("synthetic-"):
        params["stores"]["synthetic"]["window_rows"] = 4096
    if name == "synthetic-stream":
        params["stores"]["synthetic"]["keep_windows"] = 2
        params["complexity"] = {}
        params["figures"]["names"] = ["fvu_l0"]
        del params["saes"]["adaptive-k"]
    project = Project(tmp_path, params)
    needs = needs_of(load_params(tmp_path / "params.yaml"))
    started = project.run("snakemake", "--cores", "2", "-n", "--quiet", "rules", "all")
    assert sum(need.jobs for need in needs.steps()) == sum(job_counts(started).values())


def test_tokenising_and_the_disk_of_merging_are_counted() -> None:
    params = load_params(ROOT / "params.yaml")
    needs = needs_of(params)
    store, source = params["stores"]["smollm2"], params["sources"]["smollm2"]
    contexts = sum(
        -(-store[f"{s}_rows"] // (source["context_length"] - 1)) for s in ("train", "evaluation")
    )
    steps = [need for need in needs.steps() if need.what.startswith("smollm2: ")]
    prepare, extract = (next(n for n in steps if n.step == step) for step in ("prepare", "extract"))
    tokenising = contexts * source["context_length"] / needs.rates.tokens_s
    writing = (
        2 * prepare.disk / needs.rates.store_write_gb_s / 1e9
    )  # the GGUF file's weights, as float32
    expected = tokenising + writing + 2 * needs.rates.job_s
    assert prepare.hours * 3600 == pytest.approx(expected, rel=1e-3)
    rows = store["train_rows"] + store["evaluation_rows"]
    row = 3 * 576 * 2  # three hook points, bfloat16
    results = sum(need.disk for need in needs.steps())
    assert extract.disk == rows * row
    assert needs.peak() - results == pytest.approx(rows * row)
    assert f"{(results + 242e6) / 1e9:.1f} GB" in line_of(as_text(needs), "kept whole")


@pytest.mark.parametrize(
    ("dtype", "row"), [("bfloat16", 3 * 576 * 2), ("int8", 3 * (576 + 4)), ("float32", 3 * 576 * 4)]
)
def test_the_disk_peaks_at_the_results_and_one_window(dtype: str, row: int) -> None:
    params = load_params(ROOT / "params.yaml")
    params["stores"]["smollm2"] |= {"dtype": dtype, "window_rows": 20000}
    needs = needs_of(params)
    results = sum(need.disk for need in needs.steps())
    assert needs.peak() - results == pytest.approx((60000 / 3 + 10000) * row)
    assert f"{needs.peak() / 1e9:.1f} GB" in line_of(as_text(needs), "of these parameters")


def line_of(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


def streamable() -> dict[str, Any]:
    """A store of 1e6 rows of 32 float32, 128 bytes a row, whose SAE sees them twice."""
    params = copy.deepcopy(SYNTHETIC)
    params["complexity"] = {}
    params["saes"] = {"topk": params["saes"]["topk"]}
    params["training"]["tokens"] = 2_000_000
    params["stores"]["synthetic"] |= {"train_rows": 1_000_000, "evaluation_rows": 10_000}
    params["figures"]["names"] = ["fvu_l0"]
    return params


def test_the_cheapest_way_that_fits_the_disk_is_named() -> None:
    needs = needs_of(validate(streamable()))
    train, held_out = 1_000_000 * 128, 10_000 * 128
    rest = needs.peak() - 2 * (train + held_out)  # inputs and weights
    kept, windowed, streamed = (way.needs for way in ways(needs))
    assert kept.peak() == needs.peak()
    assert windowed.peak() == pytest.approx(rest + 1.1 * train + 2 * held_out)
    assert streamed.peak() == pytest.approx(rest + 0.3 * train + 2 * held_out)
    assert kept.hours() < windowed.hours() < streamed.hours()
    for free, name in [
        (kept.peak(), "kept whole"), (kept.peak() - 1, "windowed"), (windowed.peak() - 1, "streamed"),
    ]:  # fmt: skip
        assert f"The cheapest way that fits: {name}." in as_text(needs, free=free)
    text = as_text(needs, free=streamed.peak() - 1)
    assert "too little for these parameters. None fits." in text
    assert line_of(text, "streamed, 2 of 10 windows")


def test_a_source_whose_rows_are_read_after_training_is_not_streamed() -> None:
    """Latents of SAEs on smollm2 are interpreted; guided SAEs and probes are no reason."""
    needs = needs_of(load_params(ROOT / "params.yaml"))
    assert needs.plan.interpreted
    _, windowed, streamed = ways(needs)
    assert not streamed.needs.plan.is_streamed("smollm2")
    assert streamed.needs.plan.is_streamed("varying")
    assert streamed.needs.peak() < windowed.needs.peak()
    text = as_text(needs)
    assert "smollm2 cannot be streamed: evaluation.interpretability.runs with" in text
    assert "varying cannot be streamed" not in text


def test_a_stream_keeps_so_many_windows_and_extracts_again_for_a_second_pass() -> None:
    params = streamable()
    kept = needs_of(validate(params))
    params["stores"]["synthetic"] |= {"window_rows": 100_000, "keep_windows": 2}  # 10 windows
    params["training"]["tokens"] = 1_250_000  # 13 draws
    needs = needs_of(validate(params))
    extract, before = (
        next(need for need in one.steps() if need.step == "extract") for one in (needs, kept)
    )
    assert extract.disk == 10_000 * 128
    assert before.disk == 1_010_000 * 128
    again = (extract.hours - before.hours) * 3600 - needs.rates.job_s * (extract.jobs - before.jobs)
    writing = 2 * 128 / needs.rates.store_write_gb_s / 1e9  # to blocks and to the store
    assert again == pytest.approx(writing * 300_000, rel=1e-3)


def test_saes_at_a_found_l0_are_trained_in_a_pass_of_their_own_from_the_first_window_on() -> None:
    params = streamable()
    params["stores"]["synthetic"] |= {"window_rows": 100_000, "keep_windows": 2}  # 10 windows
    params["training"]["tokens"] = 1_250_000  # 13 draws
    guide = params["saes"]["topk"]
    guided = {"options": {"k": {"mean_l0_of": "topk/d128-k8-seed0"}}, "tokens": 450_000}  # 5 draws
    params["saes"]["guided"] = {**guide, **guided}
    plan = Plan(validate(params))
    begins = {run.entry: plan.first_draw(name) for name, run in plan.runs.items()}
    assert begins.pop("guided") == 20  # window 0 of the third epoch
    assert set(begins.values()) == {0}
    assert plan.extracted_draws("synthetic") == 13 + 5
    assert not plan.readers_of_rows("synthetic")


def test_a_group_is_a_job_more_than_its_runs(tmp_path: Path) -> None:
    Project(tmp_path, SYNTHETIC)
    params = load_params(tmp_path / "params.yaml")
    params["runtime"]["saes_per_job"] = 8
    needs = needs_of(params)
    jobs = {need.step: need.jobs for need in needs.steps()}
    runs = len(needs.plan.runs)
    assert jobs["train"] == runs + 1
    assert jobs["evaluate"] == runs + 2  # and the baselines


def test_the_document_shows_what_is_printed() -> None:
    rates = Rates.read(SCALE / "h200.yaml")
    plan = Plan(load_params(SCALE / "params.yaml"))
    needs = Needs(plan, rates, count_passes(plan, Path("results")))
    assert as_text(needs) in (ROOT / "docs/scale.md").read_text()


def test_each_machine_has_a_column_and_says_what_was_not_measured() -> None:
    params = load_params(ROOT / "presets/softsae-vision.yaml")
    cpu, gpu = (needs_of(params, path) for path in (RATES, RATES.with_name("rates-h200.yaml")))
    text = as_text(cpu, gpu)
    assert "time, 2 cores  time, one H200" in text.splitlines()[0]
    assert text.splitlines()[-1].startswith("At the rates of: one H200")
    assert "Arithmetic, not measured: images_s, job_s" in text
    train = [next(need for need in one.steps() if need.step == "train") for one in (cpu, gpu)]
    assert train[0].hours > 20 * train[1].hours
    assert train[0].disk == train[1].disk
    decoding = next(need for need in cpu.steps() if need.step == "prepare")
    assert decoding.hours == pytest.approx(2_850_000 / 279 / 3600, rel=0.01)
