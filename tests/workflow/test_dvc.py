"""DVC over Snakemake: one change reruns one chain, checkouts leave nothing to do."""

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from .conftest import SYNTHETIC, Project, job_counts

pytestmark = [pytest.mark.workflow, pytest.mark.heavy]
PARAMS: dict[str, Any] = {
    **SYNTHETIC,
    "saes": {name: SYNTHETIC["saes"][name] for name in ("topk", "relu", "adaptive-k")},
    "figures": {**SYNTHETIC["figures"], "names": ["fvu_l0", "training"]},
}
"""Few jobs: each is run again and again here."""


def git(project: Project, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return project.run("git", *identity, *arguments)


def commit(project: Project, message: str) -> str:
    git(project, "add", "-A")
    git(project, "commit", "-qm", message)
    return git(project, "rev-parse", "HEAD").strip()


def set_k(project: Project, values: list[int]) -> None:
    params = copy.deepcopy(PARAMS)
    params["saes"]["topk"]["options"]["k"] = values
    project.write(params)


def drop_changes(project: Project, revision: str) -> None:
    """Go to a commit and leave behind what an experiment wrote, new files too."""
    git(project, "checkout", "-q", "-f", revision)
    git(project, "clean", "-fdq")
    project.run("dvc", "checkout")


def assert_clean(project: Project) -> None:
    assert "up to date" in project.run("dvc", "status")
    assert project.todo() == {}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A git repository with DVC in which `dvc repro` ran twice: k = 8, then k = 12 beside it."""
    project = Project(tmp_path_factory.mktemp("dvc"), PARAMS, cold=True)
    git(project, "init", "-q")
    commit(project, "code")
    first_run = project.run("dvc", "repro")
    assert_clean(project)
    first = commit(project, "k = 8")
    set_k(project, [8, 12])
    todo = project.todo()
    second_run = project.run("dvc", "repro")
    assert_clean(project)
    second = commit(project, "k = 8, 12")
    return project, first, second, first_run, second_run, todo


def test_a_changed_option_reruns_its_chain_only(repository: Any) -> None:
    _, _, _, first_run, second_run, todo = repository
    assert todo == {
        "train_sae": 1, "evaluate_sae": 1, "collect_tables": 1, "draw_figure": 2, "write_report": 1,
    }  # fmt: skip
    ran = job_counts(second_run)
    assert "extract_part" not in ran
    assert "Stage 'extract' didn't change, skipping" in second_run
    assert "Running stage 'extract'" in first_run


def test_repro_again_does_nothing(repository: Any) -> None:
    project = repository[0]
    text = project.run("dvc", "repro")
    assert "Running stage" not in text
    assert "up to date" in text


def test_an_older_commit_and_back_leave_nothing_to_do(repository: Any) -> None:
    project, first, second, *_ = repository
    for revision in (first, second):
        git(project, "checkout", "-q", revision)
        project.run("dvc", "checkout")
        assert_clean(project)
        assert "are as they were made" in project.run("saeflow", "verify")


def test_differences_are_shown(repository: Any) -> None:
    project, first, second, *_ = repository
    params = json.loads(project.run("dvc", "params", "diff", "--json", first, second))
    assert "saes.topk.options.k" in str(params) or "saes.topk.options.k" in params["params.yaml"]
    metrics = json.loads(project.run("dvc", "metrics", "diff", "--json", first, second))
    assert any("k12" in name for name in metrics["results/tables/metrics.json"])
    assert "file://" in project.run("dvc", "plots", "diff", first, second)
    shown = json.loads(project.run("dvc", "plots", "diff", "--json", first, second))
    (plot,) = (plot for plots in shown["data"].values() for plot in plots)
    points = plot["content"]["data"]["values"]
    assert len({point["rev"] for point in points}) == 2
    values = [(float(point["l0_mean_mean"]), float(point["fvu_mean"])) for point in points]
    assert all(l0 >= 0 and fvu >= 0 for l0, fvu in values)  # 0: the mean's L0, the identity's FVU
    assert any(l0 > 0 and fvu > 0 for l0, fvu in values)


def test_a_fresh_clone_gets_the_results_from_the_cache(repository: Any, tmp_path: Path) -> None:
    project = repository[0]
    git(project, "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = copy.copy(project)
    clone.folder = tmp_path / "clone"
    shutil.copytree(project.folder / ".dvc/cache", clone.folder / ".dvc/cache")
    clone.run("dvc", "checkout")
    assert_clean(clone)
    set_k(clone, [8, 12, 16])
    todo = clone.todo("train")
    assert todo == {"train_sae": 1}


def test_an_experiment_runs_and_applies(repository: Any) -> None:
    project, _, second, *_ = repository
    drop_changes(project, second)
    assert_clean(project)
    project.run("dvc", "exp", "run", "-n", "wider", "-S", "saes.relu.options.l1=[0.3]")
    assert "wider" in project.run("dvc", "exp", "show", "--md")
    assert_clean(project)
    drop_changes(project, second)
    project.run("dvc", "exp", "apply", "wider")
    assert_clean(project)


def test_a_grid_of_experiments_runs_from_the_queue(repository: Any) -> None:
    """Two values, two experiments, each with its metrics; what they share is trained once."""
    project, _, second, *_ = repository
    drop_changes(project, second)
    project.run("dvc", "exp", "run", "--queue", "-S", "training.lr=0.003,0.004")
    text = project.run("dvc", "exp", "run", "--run-all", "--jobs", "1")
    assert "Queued experiment" not in text
    table = pd.read_csv(
        io.StringIO(project.run("dvc", "exp", "show", "--csv", "--drop", "Created"))
    )
    tried = table[table["typ"].str.startswith("branch") & table["training.lr"].isin([0.003, 0.004])]
    assert sorted(tried["training.lr"]) == [0.003, 0.004]
    (fvu,) = [name for name in table if "relu" in name and name.endswith(".fvu")][:1]
    assert tried[fvu].notna().all()
    assert tried[fvu].nunique() == 2
    assert_clean(project)


def test_an_experiment_with_more_trials_trains_and_chooses_among_them(repository: Any) -> None:
    """Learning rates are drawn; the stated one, trial 0, is too small to win at an equal L0."""
    project, _, second, *_ = repository
    drop_changes(project, second)
    params = copy.deepcopy(PARAMS)
    topk = params["saes"]["topk"] | {"lr": 1.0e-6, "ranges": {"lr": [1.0e-3, 4.0e-3]}}
    params["saes"], params["complexity"] = {"topk": topk}, {}
    params["sweep"] = {"trials": 2, "l0": 8}
    params["figures"]["names"] = ["fvu_l0", "table_sweep"]
    project.write(params)
    commit(project, "a sweep")
    text = project.run("dvc", "exp", "run", "-n", "three", "-S", "sweep.trials=3")
    assert job_counts(text)["train_sae"] == 3
    sweeps = pd.read_csv(project.folder / "results/tables/sweeps.csv").set_index("trial")
    assert sweeps.index.tolist() == [0, 1, 2]
    within = sweeps[sweeps["is_within"] == 1]
    (chosen,) = sweeps.index[sweeps["is_chosen"] == 1]
    assert chosen == within["selection_fvu"].idxmin() != 0
    summary = pd.read_csv(project.folder / "results/tables/summary.csv")
    shown = summary[summary["entry"] == "topk"]["setting"].tolist()
    assert shown == [sweeps.loc[chosen, "setting"]]
    said = "Tuned: of 3 trials of each of 1 setting the one"
    assert said in (project.folder / "results/figures/fvu_l0/caption.md").read_text()
    assert_clean(project)
    drop_changes(project, second)


def test_plain_snakemake_then_dvc_commit_is_clean(repository: Any) -> None:
    project, _, second, *_ = repository
    drop_changes(project, second)
    params = copy.deepcopy(PARAMS)
    params["figures"]["allow_unequal_budgets"] = True
    params["saes"]["topk"]["options"]["k"] = [8, 12]
    project.write(params)
    project.snakemake("all")
    project.run("dvc", "commit", "-f")
    assert_clean(project)


def test_a_stream_takes_a_second_repro_which_starts_no_job(tmp_path: Path) -> None:
    """Training writes what is known of the windows into results/stores, an output of the stage before."""
    params = copy.deepcopy(PARAMS)
    params["complexity"] = {}
    params["saes"] = {"topk": params["saes"]["topk"]}
    params["stores"]["synthetic"] |= {"window_rows": 7000, "keep_windows": 2}
    params["training"]["tokens"] = 20000
    params["figures"]["names"] = ["fvu_l0"]
    project = Project(tmp_path, params)
    git(project, "init", "-q")
    commit(project, "code")
    assert "train_window" in job_counts(project.run("dvc", "repro"))
    made = project.contents()
    assert project.todo() == {}
    second_run = project.run("dvc", "repro")
    assert "Stage 'train' didn't change, skipping" in second_run
    assert job_counts(second_run) == {}
    assert_clean(project)
    commit(project, "a stream")
    shutil.rmtree(project.folder / "results")
    project.run("dvc", "checkout")
    assert_clean(project)
    assert project.contents() == made
