"""The real workflow on synthetic activations: what runs, what runs again, what a kill leaves."""

import copy
import json
import os
import shutil
import signal
import time
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import saeflow
from saeflow.config import expand_runs, load_params
from saeflow.plan import Plan
from saeflow.provenance import ready_of

from .conftest import ROOT, SYNTHETIC, Project, job_counts

pytestmark = pytest.mark.workflow
ADAPTIVE = "synthetic/features/adaptive-k/d128-seed0"


@pytest.fixture(scope="module")
def done(synthetic: Project) -> Project:
    synthetic.snakemake("all")
    return synthetic


def with_value(path: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(SYNTHETIC)
    *parents, last = path.split("/")
    node = params
    for key in parents:
        node = node[key]
    node[last] = value
    return params


def test_every_result_is_there_and_verifies(done: Project) -> None:
    assert (done.folder / "results/report.html").stat().st_size > 10_000
    assert "are as they were made" in done.run("saeflow", "verify")
    assert not list((done.folder / "results").rglob("*.partial"))
    assert not list((done.folder / "results").rglob("*.parts"))


def test_a_second_run_does_nothing(done: Project) -> None:
    assert done.todo() == {}


def test_file_times_do_not_matter(done: Project) -> None:
    for path in (done.folder / "results").rglob("*.json"):
        os.utime(path)
    assert done.todo() == {}


@pytest.mark.parametrize(
    ("path", "value", "jobs"),
    [
        (
            "saes/topk/options/k", [8, 12],
            {"train_sae": 1, "evaluate_sae": 1, "collect_tables": 1, "draw_figure": 3, "write_report": 1},
        ),
        (
            "evaluation/max_norm_multiple", 5,
            {"evaluate_sae": 4, "evaluate_baselines": 1, "collect_tables": 1, "draw_figure": 3, "write_report": 1},
        ),
        ("runtime/extraction_jobs", 3, {}),
        ("runtime/saes_per_job", 3, {}),
        ("runtime/threads", {"extract": 2, "train": 2, "evaluate": 2}, {}),
        ("figures/allow_unequal_budgets", True, {"draw_figure": 3, "write_report": 1}),
    ],
)  # fmt: skip
def test_one_parameter_reruns_exactly_what_depends_on_it(
    done: Project, path: str, value: Any, jobs: dict[str, int]
) -> None:
    done.write(with_value(path, value))
    try:
        assert done.todo() == jobs
    finally:
        done.write(SYNTHETIC)
    assert done.todo() == {}


def test_parts_of_another_number_are_not_asked_for_because_inputs_seem_newer(done: Project) -> None:
    """A store's parts are gone, and a checkout may give its inputs a later time than the store's."""
    for record in (done.folder / "results/sources").rglob("provenance.json"):
        os.utime(record)
    done.write(with_value("runtime/extraction_jobs", 3))
    try:
        assert done.todo() == {}
    finally:
        done.write(SYNTHETIC)


def test_a_group_makes_what_is_missing_and_the_same(done: Project) -> None:
    """One job trains, one evaluates what is missing. Of what a killed one had measured, it takes what still holds."""
    saes, evaluations = done.folder / "results/saes", done.folder / "results/evaluations"
    expected = done.contents()
    missing = [run for run in Plan(SYNTHETIC).runs if "random-decoder" not in run]
    measured = {run: (evaluations / run / "metrics.csv").read_bytes() for run in missing}
    whole, outdated = missing[:2]  # the second's SAE is trained again after it was measured
    records = {run: (evaluations / run / "provenance.json").read_bytes() for run in missing}
    for run in (whole, outdated):
        (evaluations / run).rename(ready_of(evaluations / run))
    for run in missing[1:]:
        shutil.rmtree(saes / run)
        shutil.rmtree(evaluations / run, ignore_errors=True)
    shutil.rmtree(done.folder / "results/tables")
    done.write(with_value("runtime/saes_per_job", 8))
    try:
        assert done.todo("evaluate") == {
            "train_group": 1, "train_sae": 2, "evaluate_group": 1, "evaluate_sae": 3, "collect_tables": 1,
        }  # fmt: skip
        done.snakemake("evaluate")
        assert done.contents() == expected
        for run in missing:
            assert (evaluations / run / "metrics.csv").read_bytes() == measured[run]
            record = (evaluations / run / "provenance.json").read_bytes()
            assert (record == records[run]) == (run == whole)
        assert not list((done.folder / "results").rglob("*.done"))
        assert not list((done.folder / "results").rglob("*.ready"))
    finally:
        done.write(SYNTHETIC)
    done.snakemake("all")  # the report's trace included
    assert done.todo() == {}


def test_a_group_measures_the_others_beside_a_damaged_sae(done: Project) -> None:
    evaluations = done.folder / "results/evaluations"
    good, damaged = [run for run in Plan(SYNTHETIC).runs if "random-decoder" not in run][:2]
    weights = done.folder / "results/saes" / damaged / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for run in (good, damaged):
        shutil.rmtree(evaluations / run)
    shutil.rmtree(done.folder / "results/tables")
    done.write(with_value("runtime/saes_per_job", 8))
    try:
        text = done.snakemake("evaluate", "--keep-going", code=1)
        assert f"error: results/saes/{damaged}/weights.safetensors: its bytes changed" in text
        assert (evaluations / good / "metrics.csv").exists()
        assert not (evaluations / damaged).exists()
    finally:
        weights.write_bytes(whole)
        done.write(SYNTHETIC)
    done.snakemake("all")
    assert done.todo() == {}


def test_seeds_on_the_command_line_are_seeds_of_every_sae(done: Project) -> None:
    text = done.snakemake("all", "-n", "--quiet", "rules", "--config", "seeds=[0,1]")
    todo = job_counts(text)
    assert (
        todo["train_sae"] == todo["evaluate_sae"] == len(Plan(SYNTHETIC).runs)
    )  # seed 1; 0 is there
    assert todo["compare_seeds"] == todo["train_sae"]
    text = done.snakemake("all", "-n", "--config", "seeds=[0,one]", code=2)
    assert "error: params.yaml: seeds.1: expected a whole number, found 'one'." in text


def test_inputs_made_again_under_a_whole_store_make_it_again(done: Project) -> None:
    """Snakemake remembers other parameters than the inputs' record says, as after half a checkout."""
    expected = done.contents()
    record = b"results/sources/synthetic/inputs/provenance.json"
    memory = done.folder / ".snakemake/metadata" / urlsafe_b64encode(record).decode()
    remembered = json.loads(memory.read_text())
    remembered["params"][0] = "another task"
    memory.write_text(json.dumps(remembered))
    assert done.todo("extract") == {"prepare_inputs": 1, "extract_part": 4, "merge_parts": 2}
    done.snakemake("all")
    assert done.contents() == expected
    assert done.todo() == {}


@pytest.mark.heavy
def test_a_merge_killed_at_its_very_end_is_made_again(done: Project) -> None:
    """The store is whole, but Snakemake has not seen its job end: its parts are needed again."""
    expected = done.contents()
    record = b"results/stores/synthetic/evaluation/provenance.json"
    marker = done.folder / ".snakemake/incomplete" / urlsafe_b64encode(record).decode()
    marker.write_text(json.dumps({"external_jobid": None}))
    todo = done.todo("extract")
    assert (todo["extract_part"], todo["merge_parts"]) == (2, 1)
    done.snakemake("all")
    assert done.contents() == expected
    assert done.todo() == {}


def test_a_part_whose_deletion_was_killed_is_no_reason_to_make_its_store_again(
    done: Project,
) -> None:
    """A kill while Snakemake deletes a part left its folder, newer than the store, without some of its files."""
    expected = done.contents()
    half = done.folder / "results/stores/synthetic/train.parts/0/0-of-2"
    (half / "features").mkdir(parents=True)
    (half / "features/0.safetensors").touch()
    assert done.todo() == {}
    assert not half.exists()
    half.mkdir(parents=True)
    outputs = {"outputs": {"features/0.safetensors": "0"}}
    (half / "provenance.json").write_text(json.dumps(outputs))
    done.snakemake("all")
    assert not half.exists()
    assert done.contents() == expected


def test_a_code_change_reruns_the_steps_that_run_it(done: Project) -> None:
    path = done.folder / "src/saeflow/figures/style.py"
    code = path.read_text()
    done.cold = True  # which reads the folder's own code
    try:
        path.write_text("# a comment\n" + code)
        assert done.todo() == {}
        path.write_text(code + "\nassert True\n")
        assert done.todo() == {"draw_figure": 3, "write_report": 1}
    finally:
        path.write_text(code)
        done.cold = False


def test_the_figures_trace_down_to_the_dictionary(done: Project) -> None:
    for figure in sorted((done.folder / "results/figures").iterdir()):
        text = done.run("saeflow", "trace", f"results/figures/{figure.name}/{figure.name}.svg")
        assert "results/sources/synthetic/inputs" in text
        assert "every link holds" in text


def test_an_edited_store_breaks_trace_and_verify_and_stops_training(done: Project) -> None:
    shard = max(
        (done.folder / "results/stores/synthetic/train").rglob("c/**/*"),
        key=lambda p: p.is_file() and p.stat().st_size,
    )
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    shard.write_bytes(bytes(flipped))
    name = os.path.relpath(shard, done.folder)
    try:
        for command in (
            ("trace", "results/figures/fvu_l0/fvu_l0.svg"),
            ("verify",),
            ("verify", "results/stores/synthetic/train"),
        ):
            text = done.run("saeflow", *command, code=2)
            assert name in text
            assert "Traceback" not in text
        done.write(with_value("saes/topk/options/k", [12]))
        text = done.snakemake("train", code=1)
        assert name in text
    finally:
        done.write(SYNTHETIC)
        shard.write_bytes(whole)
    assert "are as they were made" in done.run("saeflow", "verify")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("saes/topk/options/k", 100_000, "saes.topk.options.k: expected 1..128 (d_sae)"),
        ("saes/topk/variant", "topq", "saes.topk.variant: expected one of"),
        ("sources/synthetic/noise", 0.1, "unknown key noise"),
    ],
)
def test_a_mistyped_parameter_stops_before_the_first_job(
    done: Project, path: str, value: Any, message: str
) -> None:
    done.write(with_value(path, value))
    try:
        text = done.snakemake("all", code=2)
    finally:
        done.write(SYNTHETIC)
    assert message in text
    assert "Traceback" not in text


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.02)


def kill_all(process: Any) -> None:
    """SIGKILL to snakemake and every job of it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.heavy
def test_killed_runs_end_with_the_digests_of_an_undisturbed_one(
    done: Project, tmp_path: Path
) -> None:
    project = Project(tmp_path, SYNTHETIC, cold=True)
    results = project.folder / "results"
    process = project.start("snakemake", "--cores", "2", "train")
    wait_for(lambda: list(results.glob("stores/synthetic/train.parts/*/*.partial/*/*.safetensors")))
    kill_all(process)
    assert not (results / "stores/synthetic/train").exists()
    killed = 0
    for _ in range(2):
        project.run("snakemake", "--unlock")
        before = set(results.glob("saes/**/*.partial/checkpoint*"))
        process = project.start("snakemake", "--cores", "2", "train")

        def came_far(before: Any = before, process: Any = process) -> bool:
            new = set(results.glob("saes/**/*.partial/checkpoint*")) - before
            return bool(new) or process.poll() is not None  # the second may be too quick

        wait_for(came_far)
        if process.poll() is None:
            kill_all(process)
            killed += 1
    assert killed
    project.run("snakemake", "--unlock")
    project.snakemake("train")
    made = ("results/stores/", "results/saes/")
    expected = {name: digest for name, digest in done.contents().items() if name.startswith(made)}
    assert project.contents() == expected
    assert len(expected) == 6


def test_an_adaptive_sae_is_exported_with_what_it_costs(done: Project) -> None:
    """The threshold against a brute count on all rows, the error against one pass over them."""
    sae = saeflow.load(done.folder / f"results/saes/{ADAPTIVE}")
    held_out = done.folder / "results/stores/synthetic/evaluation/features.zarr"
    store = saeflow.open_store(held_out)
    said = done.run(
        "saeflow", "export", f"results/saes/{ADAPTIVE}", "--library", "saelens", "--out", "exported",
        "--store", "results/stores/synthetic/evaluation/features.zarr",
    )  # fmt: skip
    config = json.loads((done.folder / "exported/cfg.json").read_text())
    cost = config["metadata"]["calibrated"]
    x = store.read(0, store.rows).float()
    with torch.no_grad():
        acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        own, kept = sae.encode(x), torch.where(acts > cost["threshold"], acts, 0.0)
        spread = (x - x.mean(0)).square().sum()
        for name, latents in (("own", own), ("exported", kept)):
            fvu = (x - latents @ sae.W_dec - sae.b_dec).square().sum() / spread
            assert cost[f"fvu_{name}"] == pytest.approx(float(fvu), rel=1e-4)
            l0 = float((latents != 0).sum(1).double().mean())
            assert cost[f"l0_mean_{name}"] == pytest.approx(l0, rel=1e-3)
    assert cost["l0_mean_exported"] == pytest.approx(cost["l0_mean_own"], rel=1e-3)
    assert f"FVU {cost['fvu_own']:.4f} becomes {cost['fvu_exported']:.4f}" in said
    refused = done.run("saeflow", "export", f"results/saes/{ADAPTIVE}", "--library", "saelens", "--out", "none", code=2)  # fmt: skip
    assert "--store" in refused
    assert not (done.folder / "none").exists()


def test_an_sae_of_another_library_stands_in_the_same_tables(done: Project) -> None:
    """A ReLU SAE goes out and comes back: its line in every table is the one it had."""
    own = "synthetic/features/relu/d128-l10.5-seed0"
    done.run("saeflow", "export", f"results/saes/{own}", "--library", "saelens", "--out", "theirs")
    params = copy.deepcopy(SYNTHETIC)
    store = "/".join(own.split("/")[:2])
    params["saes"]["taken"] = {"import": {"library": "saelens", "folder": "theirs"}, "store": store}
    before = done.contents()
    run = f"{store}/taken/imported-saelens"
    try:
        done.write(params)
        done.snakemake("all")
        assert done.todo() == {}
        found = json.loads((done.folder / "results/tables/metrics.json").read_text())
        assert found[run].keys() == found[own].keys()
        for name, value in found[own].items():
            assert found[run][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        record = json.loads((done.folder / f"results/saes/{run}/provenance.json").read_text())
        assert record["external"].keys() >= {"theirs/cfg.json", "theirs/sae_weights.safetensors"}
        page = (done.folder / "results/report.html").read_text()
        assert "taken over from saelens: theirs" in page
        alone = params | {"saes": {"taken": params["saes"]["taken"]}, "complexity": {}}
        del alone["training"]
        done.write(alone | {"figures": params["figures"] | {"names": ["fvu_l0"]}})
        assert "0 SAEs and 1 of other libraries, 1 figure." in done.run("saeflow", "validate")
        said = done.snakemake("all")
        assert "results/figures/recovery: figures.names does not name it" in said
        page = (done.folder / "results/report.html").read_text()
        assert "1 SAE, 1 figure;" in page
        assert "Schedules" not in page
        assert "untuned" not in page
        (done.folder / "theirs/cfg.json").unlink()
        params["saes"]["taken"]["import"]["folder"] = "nowhere"
        done.write(params)
        refused = done.run("saeflow", "validate", code=2)
        assert "saes.taken.import.folder: no such folder: nowhere" in refused
    finally:
        done.write(SYNTHETIC)
        done.snakemake("all")
    same = {name: digest for name, digest in done.contents().items() if "/taken/" not in name}
    assert {name: same[name] for name in before if "/saes/" in name} == {
        name: before[name] for name in before if "/saes/" in name
    }


def test_the_hub_folder_loads_and_its_card_is_read_by_the_hubs_library(done: Project) -> None:
    from huggingface_hub import ModelCard

    done.run(
        "saeflow", "export", f"results/saes/{ADAPTIVE}", "--library", "hub", "--out", "card",
        "--evaluation", f"results/evaluations/{ADAPTIVE}",
    )  # fmt: skip
    card = ModelCard.load(done.folder / "card/README.md")
    assert card.data.library_name == "saeflow"
    assert "adaptive_k" in card.data.tags
    record = json.loads((done.folder / f"results/saes/{ADAPTIVE}/provenance.json").read_text())
    assert record["digest"] in card.content
    metrics = pd.read_csv(done.folder / f"results/evaluations/{ADAPTIVE}/metrics.csv")
    fvu = metrics.set_index("metric").value["fvu"]
    assert fvu > 0.1  # then three significant digits are three decimals
    assert f"| FVU | {fvu:.3f} |" in card.content
    assert "kind: synthetic" in card.content
    here, there = (saeflow.load(done.folder / f) for f in (f"results/saes/{ADAPTIVE}", "card"))
    x = torch.randn(9, here.d_in)
    with torch.no_grad():
        assert torch.equal(here(x), there(x))
    wrong = done.run(
        "saeflow", "export", f"results/saes/{ADAPTIVE}", "--library", "hub", "--out", "none",
        "--evaluation", f"results/evaluations/{ADAPTIVE.replace('adaptive-k', 'relu').replace('seed', 'l10.5-seed')}",
        code=2,
    )  # fmt: skip
    assert "found none" in wrong


def test_works_without_git_and_dvc(tmp_path: Path) -> None:
    project = Project(tmp_path, SYNTHETIC, cold=True)  # its own package says which commit it is of
    made = "results/sources/synthetic/inputs/provenance.json"
    project.snakemake(made)
    record = json.loads((project.folder / made).read_text())
    assert record["code"]["commit"] is None


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_plans(path: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, SYNTHETIC)
    jobs = job_counts(project.snakemake("all", "-n", "--quiet", "rules", "--configfile", str(path)))
    runs = len(expand_runs(load_params(path)))
    assert jobs["train_sae"] == jobs["evaluate_sae"] == runs
    assert jobs["write_report"] == 1
