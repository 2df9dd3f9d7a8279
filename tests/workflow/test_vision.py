"""The real workflow on scenes and a small CLIP that it trains itself."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from .conftest import Project

pytestmark = pytest.mark.workflow
PARAMS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "vision.yaml").read_text())
RUN = "scenes/vision.blocks.0.resid_post/soft-topk/d64-seed0"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("vision"), PARAMS)
    project.snakemake("all")
    return project


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_drawn_and_traces(done: Project) -> None:
    for name in PARAMS["figures"]["names"]:
        done.run("saeflow", "trace", f"results/figures/{name}/{name}.svg")
    assert "results are as they were made" in done.run("saeflow", "verify")
    report = (done.folder / "results/report.html").read_text()
    assert "Classification through a few concepts" in report


def test_nothing_is_left_to_do(done: Project) -> None:
    assert done.todo() == {}


@pytest.mark.heavy
def test_cards_dimensions_and_probes_of_a_stream_read_the_held_out_rows(tmp_path: Path) -> None:
    """With windows that are gone every table is what it is with windows that are kept, but for PCA."""
    tables = {}
    for keep in (2, "all"):
        params = copy.deepcopy(PARAMS)
        params["stores"]["scenes"] |= {
            "window_rows": 500,
            "keep_windows": keep,
            "block_contexts": 4,
        }
        (tmp_path / str(keep)).mkdir()
        project = Project(tmp_path / str(keep), params)
        said = project.snakemake("all")
        assert ("the PCA baselines of scenes are left out" in said) is (keep == 2)
        assert (
            "its probe at scenes/vision.blocks.0.resid_post is fitted to half of the held" in said
        )
        assert "results are as they were made" in project.run("saeflow", "verify")
        results = project.folder / "results"
        assert list(results.glob("figures/*/*.svg"))
        cards = load_file(results / f"evaluations/latents/{RUN}/latents.safetensors")
        tables[keep] = {name: array.tobytes() for name, array in cards.items()}
        for path in sorted((results / "tables").glob("*.csv")):
            found = [line for line in rows(path) if line.get("variant") != "pca"]
            for line in found:
                line.pop("tokens_per_s", None)
            tables[keep][path.name] = found
    assert {"dimension.csv", "classification.csv", "metrics.csv"} <= tables[2].keys()
    assert tables[2] == tables["all"]


def test_a_new_labelled_set_trains_nothing_again(done: Project) -> None:
    params = copy.deepcopy(PARAMS)
    params["evaluation"]["labelled_sets"]["one"]["templates"] = ["a picture of a {}"]
    done.write(params)
    todo = done.todo()
    done.write(PARAMS)
    assert set(todo) == {
        "prepare_labelled", "evaluate_clean", "evaluate_group", "evaluate_sae", "evaluate_baselines", "show_latents",
        "collect_tables", "draw_figure", "write_report",
    }  # fmt: skip


def test_tables_hold_images_sets_and_dimensions(done: Project) -> None:
    tables = done.folder / "results/tables"
    lines = rows(tables / "classification.csv")
    assert {line["set"] for line in lines} == {"one"}
    assert {line["n"] for line in lines} == {"1", "5", "10", "50", "all"}
    assert {line["images"] for line in lines} == {"42"}
    images = [line for line in rows(tables / "contexts.csv") if line["run"] == RUN]
    assert len(images) == 10
    assert all(0 <= int(line["objects"]) <= 3 for line in images)
    assert {line["estimator"] for line in rows(tables / "dimension.csv")} == {"mle", "twonn"}
    metrics = json.loads((tables / "metrics.json").read_text())[RUN]
    assert {"zero_shot", "fvu_cls", "fvu_patches", "spearman_l0_objects"} <= set(metrics)
    assert "ce_spliced" not in metrics


def test_the_probe_reads_the_cls_token(done: Project) -> None:
    folder = done.folder / "results/complexity/scenes/objects"
    scores = rows(folder / "scores/scores.csv")
    assert {line["position"] for line in scores} == {"0"}
    objects = np.load(done.folder / "results/sources/scenes/inputs/train_objects.npy")
    train = [line for line in scores if line["split"] == "train"]
    assert [float(line["score"]) for line in train] == objects.tolist()
    examples = load_file(folder / "probes/vision.blocks.0.resid_post/probe.safetensors")["examples"]
    import saeflow

    store = saeflow.open_store(
        done.folder / "results/stores/scenes/train/vision.blocks.0.resid_post.zarr"
    )
    cls = store.read(0, store.rows).numpy()[store.column("position") == 0]
    assert np.array_equal(examples, cls)


def test_cards_show_where_concepts_fire(done: Project) -> None:
    """The masks are the SAE's own latents at the images' places in the store."""
    import torch

    import saeflow

    folder = done.folder / "results"
    cards = json.loads((folder / "tables/cards" / RUN / "cards.json").read_text())
    arrays = load_file(folder / "tables/cards" / RUN / "cards.safetensors")
    store = saeflow.open_store(folder / "stores/scenes/evaluation/vision.blocks.0.resid_post.zarr")
    page = (folder / "evaluations/latents" / RUN / "latents.html").read_text()
    assert "64 latents on" in page
    assert "stands for the whole image" in page
    sae = saeflow.load(folder / "saes" / RUN)
    with torch.no_grad():
        latents = sae.encode(store.read(0, store.rows).float()).numpy()
    context, position = store.column("context"), store.column("position")
    pixels = np.load(folder / "sources/scenes/inputs/evaluation.npy")
    for number, card in enumerate(cards["concepts"]):
        for i, image in enumerate(card["images"]):
            mine = (context == image) & (position > 0)
            expected = np.zeros(16)
            expected[position[mine] - 1] = latents[mine, card["latent"]]
            assert arrays["masks"][number, i].ravel() == pytest.approx(np.abs(expected), abs=1e-5)
            assert np.array_equal(arrays["pixels"][number, i], pixels[image])
        assert card["prompt"]
    for number, shown in enumerate(cards["shown"]):
        mine = context == shown["context"]
        assert shown["l0"] == pytest.approx((latents[mine] != 0).sum(1).mean())
        assert arrays["shown_l0"][number].sum() == (latents[mine & (position > 0)] != 0).sum()
