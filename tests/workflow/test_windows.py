"""The real workflow with a store of several windows: how much disk it takes, what a kill leaves, what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from saeflow.stores import open_store

from .conftest import SYNTHETIC, Project, Watch, kill, on_disk

pytestmark = pytest.mark.workflow
WINDOWS = 4


def windowed(**store: Any) -> dict[str, Any]:
    params = copy.deepcopy(SYNTHETIC)
    params["stores"]["synthetic"] |= {"window_rows": 5000, "block_contexts": 4, **store}
    params["runtime"]["extraction_jobs"] = 1
    return params


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("windows"), windowed())
    store = project.folder / "results/stores"
    store.mkdir(parents=True)
    watch = Watch(store)
    watch.start()
    project.snakemake("extract")
    assert watch.is_alive()
    peak, whole = watch.end(), on_disk(store / "synthetic/train")
    held_out = on_disk(store / "synthetic/evaluation")
    assert whole < peak <= whole * (1 + 1.2 / WINDOWS) + 2 * held_out
    return project


def test_windows_are_put_together_and_nothing_else_is_left(done: Project) -> None:
    store = open_store(done.folder / "results/stores/synthetic/train/features.zarr")
    assert len(store.attrs["windows"]) == WINDOWS
    assert store.rows == 20096  # whole contexts
    left = {path.name for path in (done.folder / "results/stores/synthetic").iterdir()}
    assert left == {"train", "evaluation"}
    assert done.todo("extract") == {}
    assert "are as they were made" in done.run("saeflow", "verify")


@pytest.mark.heavy
def test_jobs_and_kills_change_no_digest(done: Project, tmp_path: Path) -> None:
    params = windowed()
    params["runtime"]["extraction_jobs"] = 2
    project = Project(tmp_path, params, cold=True)
    for seconds in (9, 7):
        kill(project.start("snakemake", "--cores", "2", "extract"), seconds)
        project.run("snakemake", "--unlock")
    project.cold = False
    project.snakemake("extract")
    assert project.contents() == done.contents()


def trained(keep: Any) -> dict[str, Any]:
    """Two SAEs of other batch sizes and budgets, on the windows of an epoch and a quarter."""
    params = windowed(keep_windows=keep)
    params["complexity"] = {}
    topk = params["saes"]["topk"] | {"options": {"k": 8}}
    relu = params["saes"]["relu"] | {"batch_size": 300, "tokens": 12000, "options": {"l1": 0.5}}
    params["saes"] = {"topk": topk, "relu": relu}
    params["training"]["tokens"] = 25000
    params["figures"]["names"] = ["fvu_l0"]
    params["runtime"]["saes_per_job"] = 8
    return params


def saes(project: Project) -> dict[str, Any]:
    return {name: found for name, found in project.contents().items() if "/saes/" in name}


@pytest.mark.heavy
def test_a_killed_stream_gives_the_saes_of_the_kept_windows(done: Project, tmp_path: Path) -> None:
    done.write(trained("all"))
    assert "extract_part" not in done.todo("train")  # the store is the one that is there
    done.snakemake("train")
    project = Project(tmp_path, trained(2), cold=True)
    folder = project.folder / "results/stores/synthetic"
    folder.mkdir(parents=True)
    watch = Watch(folder)
    watch.start()
    for seconds in (14, 18):
        kill(project.start("snakemake", "--cores", "2", "train"), seconds)
        project.run("snakemake", "--unlock")
    project.snakemake("train")
    peak, left = watch.end(), on_disk(folder)
    assert saes(project) == saes(done)
    assert len(saes(done)) == 2
    # activations, context, position, true features of the rows of a window; two windows and the parts of one
    window = 5000 * (32 * 4 + 8 + 4 + 6 * (4 + 4))
    assert peak < 3.5 * window + left
    assert [path.name for path in folder.iterdir()] == ["train"]
    assert left < window  # no row of the training split is left
    assert project.todo("train") == {}
    (sae,) = (name for name in saes(project) if "/topk/" in name)
    measured = sae.replace("/saes/", "/evaluations/")
    project.snakemake(f"{measured}/provenance.json")
    assert not list((project.folder / "results").rglob("*.stream"))
    assert not list((project.folder / "results/saes.groups").glob("*"))
    assert "are as they were made" in project.run("saeflow", "verify")
    params = trained(2)
    params["saes"]["further"] = params["saes"]["topk"] | {"options": {"k": 4}}
    params["runtime"]["saes_per_job"] = 1
    project.write(params)
    again = project.todo(
        "train"
    )  # a further SAE needs the windows again, and nothing else is made anew
    assert again == {"extract_part": 5, "merge_window": 5, "train_window": 5, "train_sae": 1}


def guided(keep: Any) -> dict[str, Any]:
    """An SAE that finds its L0, one with a probe, and one at the L0 that was found: on three windows, an epoch and a third."""
    params = windowed(keep_windows=keep, window_rows=7000)
    relu = params["saes"]["relu"] | {"tokens": 26000, "options": {"l1": 0.5}}
    options = {"k": {"mean_l0_of": "relu/d128-seed0"}}
    params["saes"] = {
        "relu": relu,
        "adaptive-k": params["saes"]["adaptive-k"] | {"tokens": 26000},
        "at-its-l0": params["saes"]["topk"] | {"tokens": 12000, "options": options},
    }
    params["figures"]["names"] = ["fvu_l0"]
    params["evaluation"]["bootstrap"] = None
    params["runtime"]["saes_per_job"] = 8
    return params


@pytest.mark.heavy
def test_an_sae_at_the_l0_that_another_finds_is_trained_in_a_second_pass(tmp_path: Path) -> None:
    """Draws 0 to 3 train two SAEs, 6 and 7 the one that is guided by the first; the kept windows give the same three."""
    for keep in ("all", 2):
        (tmp_path / str(keep)).mkdir()
    kept = Project(tmp_path / "all", guided("all"))
    kept.snakemake("train")
    streamed = Project(tmp_path / "2", guided(2))
    assert streamed.todo("train")["train_window"] == 4 + 2
    assert streamed.todo("train")["merge_window"] == 4 + 2
    watch = Watch(streamed.folder / "results/stores/synthetic")
    watch.start()
    streamed.snakemake("train")
    peak = watch.end()
    assert saes(streamed) == saes(kept)
    assert len(saes(kept)) == 3
    (name,) = (name for name in saes(kept) if "/at-its-l0/" in name)
    for project in (kept, streamed):
        config = json.loads((project.folder / name / "config.json").read_text())
        assert isinstance(config["options"]["k"], int)
    window = 7000 * (32 * 4 + 8 + 4 + 6 * (4 + 4))
    assert peak < 3.5 * window
    assert streamed.todo("train") == {}
    assert not list((streamed.folder / "results").rglob("*.stream"))
    assert not list((streamed.folder / "results/stores/synthetic").glob("*.windows/*"))
    (streamed.folder / name / "provenance.json").unlink()  # its guide is there: one pass alone
    again = streamed.todo("train")
    assert again == {"extract_part": 2, "merge_window": 2, "train_window": 2, "train_sae": 1}
