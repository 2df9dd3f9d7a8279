"""The real workflow on a small real GPT-2 in a local folder, reading local text files."""

import copy
import csv
import json
import os
import pydoc_data.topics
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import saeflow
from saeflow.config import ROOT

from ..browser import document
from .conftest import Project

pytestmark = pytest.mark.workflow
PARAMS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "text.yaml").read_text())

GIVEN = ("model", "0.txt", "1.txt", "own_scorer.py")
"""Files of the user's own."""
SCORER = """
def same_token(examples, windows):
    known = {one.texts[one.mark] for one in examples if one.fires}
    return [1 if one.texts[one.mark] in known else -1 for one in windows]
"""
RUN = "gpt2/blocks.2.resid_post/topk/d96-seed0"


def make_model(folder: Path, documents: list[str]) -> None:
    """A GPT-2 of 4 blocks with random weights and a tokenizer trained on the documents."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"])
    )
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_positions=64, n_embd=48, n_layer=4, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("text"), PARAMS)
    documents = list(pydoc_data.topics.topics.values())
    make_model(project.folder / "model", documents)
    for number in range(2):
        text = "\n\n".join(documents[number::8])
        (project.folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (project.folder / "own_scorer.py").write_text(SCORER)
    project.snakemake("all")
    return project


def test_two_hook_points_come_from_one_extraction(done: Project) -> None:
    record = json.loads((done.folder / "results/stores/gpt2/train/provenance.json").read_text())
    assert sorted(record["content"]) == ["blocks.1.attn_out", "blocks.2.resid_post"]


def test_one_extraction_job_gives_the_digests_of_three(done: Project, tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    params["runtime"]["extraction_jobs"] = 1
    project = Project(tmp_path, params)
    for name in GIVEN:
        (project.folder / name).symlink_to(done.folder / name)
    project.snakemake("extract")
    stores = {name: content for name, content in done.contents().items() if "/stores/" in name}
    assert project.contents() == stores
    assert len(stores) == 2


def test_the_figures_trace_down_to_model_and_text(done: Project) -> None:
    text = done.run("saeflow", "trace", "results/figures/ce_l0/ce_l0.pdf")
    for name in ("results/sources/gpt2/model", "results/sources/gpt2/inputs", "0.txt", "1.txt"):
        assert name in text


@pytest.mark.parametrize(
    "name",
    ["0.txt", "model/model.safetensors", "results/sources/gpt2/inputs/train.npy", "results/tables/metrics.csv"],
)  # fmt: skip
def test_editing_anything_upstream_breaks_the_trace(done: Project, name: str) -> None:
    path = done.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        text = done.run("saeflow", "trace", "results/figures/ce_l0/ce_l0.svg", code=2)
    finally:
        path.write_bytes(whole)
    assert name in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()[-1]) < 400


def test_a_layer_the_model_does_not_have_stops_before_the_first_job(done: Project) -> None:
    params = copy.deepcopy(PARAMS)
    params["sources"]["gpt2"]["hook_points"] = ["blocks.9.resid_post"]
    params["saes"]["topk"]["store"] = "gpt2/blocks.9.resid_post"
    del params["evaluation"]["latents"], params["evaluation"]["interpretability"]
    params["figures"]["names"] = ["ce_l0", "training"]
    done.write(params)
    try:
        for command in (("saeflow", "validate"), ("snakemake", "--cores", "2", "all")):
            text = done.run(*command, code=2)
            assert "blocks.9.resid_post" in text
            assert "4 blocks" in text
            assert "Traceback" not in text
    finally:
        done.write(PARAMS)


@pytest.mark.heavy
def test_interrupting_leaves_nothing_half_written(done: Project, tmp_path: Path) -> None:
    project = Project(tmp_path, PARAMS, cold=True)
    for name in GIVEN:
        (project.folder / name).symlink_to(done.folder / name)
    process = project.start("snakemake", "--cores", "2", "extract")
    end = time.monotonic() + 120
    while not list(project.folder.glob("results/stores/gpt2/*.parts/*/*.partial")):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert not list(project.folder.glob("results/stores/gpt2/*/provenance.json"))
    project.cold = False
    project.snakemake("extract")
    stores = {name: content for name, content in done.contents().items() if "/stores/" in name}
    assert project.contents() == stores


def test_the_report_links_to_a_page_of_latent_cards_that_traces(done: Project) -> None:
    page = f"evaluations/latents/{RUN}/latents.html"
    assert f'href="{page}"' in (done.folder / "results/report.html").read_text()
    assert "results/sources/gpt2/inputs" in done.run("saeflow", "trace", f"results/{page}")
    assert "of 96 latents" in document(done.folder / "results" / page, done.folder / "profile")


def test_latents_are_probed_and_told_by_a_scorer_of_the_users_own(done: Project) -> None:
    tables = done.folder / "results/tables"
    with (tables / "probing.csv").open() as file:
        probes = list(csv.DictReader(file))
    assert {line["run"] for line in probes} == {RUN}
    assert {"starts a word", "letters without a space before"} <= {line["task"] for line in probes}
    assert {line["method"] for line in probes} == {"latents", "neurons", "activation"}
    with (tables / "detection.csv").open() as file:
        told = list(csv.DictReader(file))
    assert 0 < len(told) <= 8
    for line in told:  # the area under the curve of scores that are 1 or -1
        assert float(line["auc"]) == pytest.approx(float(line["balanced_accuracy"]))
    report = (done.folder / "results/report.html").read_text()
    for name in ("probing", "table_interpretability"):
        assert f'id="figure-{name}"' in report
    traced = done.run(
        "saeflow", "trace", "results/figures/table_interpretability/table_interpretability.md"
    )
    assert "own_scorer.py" in traced


def test_first_letters_have_a_line_each_in_the_table_of_absorption(done: Project) -> None:
    with (done.folder / "results/tables/absorption.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["run"] for line in lines} == {RUN}
    *letters, mean = [line["letter"] for line in lines]
    assert letters == sorted(set(letters))
    assert mean == "mean"
    assert "meaningless" in (done.folder / "results/report.html").read_text()
    assert "below 1e+09 and 16384" in (done.folder / f"logs/interpret_sae/{RUN}.log").read_text()


def test_the_worked_example_runs(
    done: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of docs/python.md and of README, one after the other, on this run's model and SAE."""
    import torch

    from saeflow.sources.models import load_model

    names = {
        "smollm2": "gpt2", "blocks.19": "blocks.2",
        "d1536-k32-seed0": "d96-seed0", "0.01) & (rate < 0.05)": "0) & (rate < 0.9)",
    }  # fmt: skip

    def run(text: str, known: dict[str, Any]) -> dict[str, Any]:
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            for name, here in names.items():
                block = block.replace(name, here)
            exec(compile(block, "example", "exec"), known)
        return known

    monkeypatch.chdir(done.folder)
    found = run((ROOT / "docs/python.md").read_text(), {})
    printed = capsys.readouterr().out
    for said in (
        "most on ['",
        "spliced",
        "without: logits",
        "held: logits",
        "positions went through",
    ):
        assert said in printed
    assert found["spliced"].loss != found["clean"].loss
    assert sum(found["seen"]) == 5 + 11  # the prompt without position 0, then one at a time
    assert found["rise"] == pytest.approx(found["metrics"]["ce_degradation"], abs=1e-4)
    model, sae, ids = found["model"], found["sae"], found["ids"]
    torch.manual_seed(0)
    fresh = load_model(done.folder / "results/sources/gpt2/model", "cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    gradient = found["kept"]["latents"].grad
    step = 1e-2
    latent = int((found["kept"]["latents"][-1] != 0).nonzero()[0])

    def logit(value: float) -> float:
        def nudge(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[-1, latent] += value
            return z

        with (
            torch.no_grad(),
            saeflow.hook(model, found["hook_point"], sae, edit=nudge, keep_error=True),
        ):
            return float(model(ids).logits[0, -1, int(ids[0, -1])])

    slope = (logit(step) - logit(-step)) / (2 * step)
    assert float(gradient[-1, latent]) == pytest.approx(slope, rel=0.05, abs=1e-4)
    run((ROOT / "README.md").read_text(), {"model": model, "token_ids": ids})


def test_the_tutorial_runs(done: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of docs/tutorial.ipynb, with this run in the place of its own."""
    from docs.notebook import code_cells, execute, read

    _, *cells = ["".join(cell["source"]) for cell in code_cells(read())]
    here = 'from pathlib import Path\nSOURCE, HOOK_POINT, folder = "gpt2", "blocks.2.resid_post", Path()'
    usual = "(rate > 0.002) & (rate < 0.03)"
    assert sum(usual in cell for cell in cells) == 1
    monkeypatch.chdir(done.folder)
    names: dict[str, Any] = {}
    outputs = list(
        execute(
            [here, *(cell.replace(usual, "(rate > 0) & (rate < 0.9)") for cell in cells)], names
        )
    )
    printed = "".join(
        "".join(one["text"]) for cell in outputs for one in cell if one["output_type"] == "stream"
    )
    assert "nats where it fires" in printed
    assert "topk" in printed
    assert [one["output_type"] for one in outputs[-1]] == ["display_data"]
    # An ablated latent changes nothing before it first fires, and something from there on.
    change = names["change"].view(len(names["chosen"]), -1)
    fires = names["active"][:, :-1]
    first = fires.int().argmax(1)
    for line, on, start in zip(change, fires, first.tolist(), strict=True):
        assert not line[:start].any()
        assert bool(line[start:].any()) == bool(on.any())
    # Its examples are those of the run's own cards.
    card = names["cards"]["value"][names["latent"]]
    assert names["top"].values[0].item() == pytest.approx(float(card[0]), rel=1e-3)


def test_snakemakes_own_report_holds_figures_with_captions(done: Project) -> None:
    """Made without a network: a proxy where nobody listens."""
    offline = ("env", "http_proxy=http://127.0.0.1:9", "https_proxy=http://127.0.0.1:9")
    done.run(*offline, "snakemake", "--report", "held.html")
    page = (done.folder / "held.html").read_text()
    for name in PARAMS["figures"]["names"]:
        caption = (done.folder / f"results/figures/{name}/caption.md").read_text()
        first = re.match(r"[\w ,:]{15,60}", caption)
        assert first is not None, caption
        assert first[0] in page, name
    for category in ("Figures", "Tables", "Latents", "Report"):
        assert f'"{category}"' in page
