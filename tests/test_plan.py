"""A changed parameter changes the keys of the jobs that depend on it, and of no other."""

import copy
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saeflow.cli import app
from saeflow.config import ROOT, load_params
from saeflow.errors import UserError
from saeflow.jobs import Groups, Jobs, arguments, read_task, read_tasks, tasks
from saeflow.local_files import content_digests
from saeflow.plan import Plan

PARAMS = load_params(ROOT / "params.yaml")


def keys(params: dict[str, Any]) -> dict[str, str]:
    plan = Plan(params)
    jobs = Jobs(plan)
    found = {"tables": jobs.tables(), "report": jobs.report()}
    for source in plan.sources:
        found[f"inputs:{source}"] = jobs.inputs(source)
        for split in ("train", "evaluation"):
            found[f"store:{source}:{split}"] = jobs.store(source, split)
        if plan.has_model(source):
            found[f"model:{source}"] = jobs.model(source)
    for source, hook_point in plan.stores:
        found[f"baselines:{source}"] = jobs.baselines(source, hook_point)
        if plan.has_model(source):
            found[f"clean:{source}"] = jobs.clean(source, hook_point, source)
    for run in plan.runs:
        found[f"sae:{run}"] = jobs.sae(run)
        found[f"evaluation:{run}"] = jobs.evaluation(run)
    for run in plan.pages:
        found[f"latents:{run}"] = jobs.latents(run)
    for setting in plan.seeds:
        found[f"stability:{setting}"] = jobs.stability(setting)
    if plan.rivals:
        found["rivals"] = jobs.rivals()
    for figure in params["figures"]["names"]:
        found[f"figure:{figure}"] = jobs.figure(figure)
    return {name: job.key for name, job in found.items()}


def changed_by(path: str, value: Any) -> set[str]:
    """Jobs of both plans whose key differs after one value was set."""
    params = copy.deepcopy(PARAMS)
    *parents, last = path.split("/")
    node = params
    for key in parents:
        node = node[key]
    node[last] = value
    before, after = keys(PARAMS), keys(params)
    return {job for job in before.keys() & after.keys() if before[job] != after[job]}


def kinds(jobs: set[str]) -> set[str]:
    return {job.split(":")[0] for job in jobs}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runtime/threads", {"extract": 4, "train": 4, "evaluate": 4}),
        ("runtime/extraction_jobs", 7),
        ("runtime/saes_per_job", 5),
        ("runtime/ranks", {"count": 2, "split": "latents"}),
        ("runtime/device", "cuda"),
        ("runtime/checkpoint_every_s", 1),
    ],
)
def test_the_machine_changes_no_key(path: str, value: Any) -> None:
    assert changed_by(path, value) == set()


def test_an_evaluation_parameter_leaves_training_alone() -> None:
    assert kinds(changed_by("evaluation/max_norm_multiple", 5)) == {
        "evaluation", "baselines", "stability", "rivals", "latents", "tables", "figure", "report",
    }  # fmt: skip


def test_intervals_and_controls_are_part_of_an_evaluation() -> None:
    assert kinds(changed_by("evaluation/bootstrap/seed", 9)) == {
        "evaluation", "baselines", "rivals", "tables", "figure", "report",
    }  # fmt: skip


def test_a_page_of_latents_changes_nothing_but_itself_and_the_report() -> None:
    assert kinds(changed_by("evaluation/latents/examples", 9)) == {"latents", "report"}


def test_seeds_of_one_setting_are_compared_and_no_others() -> None:
    seeds = Plan(PARAMS).seeds
    assert seeds["smollm2/blocks.19.resid_post/soft-topk/d1536-k32"] == [
        f"smollm2/blocks.19.resid_post/soft-topk/d1536-k32-seed{seed}" for seed in (0, 1, 2)
    ]
    assert not any("guided" in setting for setting in seeds)  # `rivals` compares these
    assert all(len(runs) > 1 for runs in seeds.values())
    assert "stability" not in kinds(changed_by("saes/relu/lr", 5.0e-4))


def test_a_pca_rank_leaves_the_saes_alone() -> None:
    assert kinds(changed_by("evaluation/pca_ranks", [4])) == {
        "baselines", "tables", "figure", "report",
    }  # fmt: skip


def test_one_entry_changes_its_own_runs_only() -> None:
    changed = changed_by("saes/topk/lr", 5.0e-4)
    runs = {job for job in changed if job.startswith(("sae:", "evaluation:"))}
    assert runs
    assert all("/topk/" in job for job in runs)
    assert kinds(changed) == {
        "sae",
        "evaluation",
        "latents",
        "tables",
        "figure",
        "report",
    }


def test_a_text_changes_everything_of_its_source_but_the_model() -> None:
    changed = changed_by("sources/smollm2/evaluation_share", 0.2)
    below = {job for job in keys(PARAMS) if "smollm2" in job and not job.startswith("model:")}
    assert {job for job in changed if "smollm2" in job} == below
    assert not {job for job in changed if "synthetic" in job}


def test_rows_of_one_split_leave_the_others_store_key_to_its_inputs() -> None:
    assert "model:smollm2" not in changed_by("stores/smollm2/train_rows", 200000)


def test_a_command_is_told_what_its_key_digests_and_nothing_else() -> None:
    """A job's task names all that it reads and its parameters; jobs of one task have what they share once."""
    jobs = Jobs(Plan(PARAMS))
    for job in jobs.every():
        (task,) = read_tasks(tasks([job]))
        assert task.params == json.loads(json.dumps(job.params))
        assert {f"{path}" for path in task.inputs} == {f"{one.path}" for one in job.before}
        assert (task.out, task.key) == (job.path, job.key)
    runs = [jobs.evaluation(run) for run in jobs.plan.evaluation_groups[0]]
    assert len(runs) > 1
    together = read_tasks(tasks(runs))
    assert together == [read_task(tasks([job])) for job in runs]
    assert len(tasks(runs)) < sum(len(tasks([job])) for job in runs)


def test_the_task_of_many_runs_is_arguments_that_linux_takes() -> None:
    """The tables of 2000 SAEs are asked for in more than one argument may hold; the command reads all of it."""
    jobs = Jobs(Plan(PARAMS))
    job = jobs.tables()
    evaluations = [
        replace(
            job, result=f"evaluations/synthetic/true/an-entry-of-a-long-sweep/d_sae16384-seed{i}"
        )
        for i in range(2000)
    ]
    # none of them is there, and what the command looks for first is named
    job = replace(job, reads={**job.reads, "dimensions": [], "evaluations": evaluations})
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(["true", tasks([job])], check=True)
    told = arguments(tasks([job]))
    subprocess.run(["true", *told], check=True)
    assert read_task(told) == read_task(tasks([job]))
    done = CliRunner().invoke(app, ["collect", *told])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"{evaluations[0].path}")


def test_no_part_of_a_task_looks_like_an_option() -> None:
    text = "x" * 99_990 + "-" * 20 + "y" * 200_000
    told = arguments(text)
    assert "".join(told) == text
    assert not isinstance(told, str)
    assert not any(one.startswith("-") for one in told)
    assert arguments("-") == "-"


def test_every_job_comes_after_those_that_it_reads() -> None:
    done: set[str] = set()
    for job in Jobs(Plan(PARAMS)).every():
        assert {one.result for one in job.before} <= done
        done.add(job.result)


def test_a_group_is_named_by_the_keys_of_its_members() -> None:
    jobs = Jobs(Plan(PARAMS))
    topk = next(run for run in jobs.plan.runs if "/topk/" in run)
    relu = next(run for run in jobs.plan.runs if "/relu/" in run)
    members = [jobs.sae(topk), jobs.sae(relu)]
    groups = Groups([members, [jobs.sae(run) for run in jobs.plan.runs][-1:]])
    (name,) = groups.members
    assert groups.members[name] == members
    assert groups.of(members[0]) == groups.of(members[1]) == name
    assert groups.of(jobs.sae(list(jobs.plan.runs)[-1])) is None  # alone
    params = copy.deepcopy(PARAMS)
    params["saes"]["topk"]["lr"] = 5.0e-4
    changed = Jobs(Plan(params))
    assert name not in Groups([[changed.sae(topk), changed.sae(relu)]]).members


def test_a_figure_option_redraws_only() -> None:
    assert kinds(changed_by("figures/allow_unequal_budgets", True)) == {"figure", "report"}


def test_groups_hold_every_run_once() -> None:
    params = copy.deepcopy(PARAMS)
    params["saes"]["other"] = {
        "store": "synthetic/features", "import": {"library": "saelens", "folder": "elsewhere"},
    }  # fmt: skip
    plan = Plan(params)
    size = params["runtime"]["saes_per_job"]
    for groups, runs in (
        (plan.training_groups, plan.runs),
        (plan.evaluation_groups, plan.evaluated),
    ):
        assert sorted(run for group in groups for run in group) == sorted(runs)
        assert all(len(group) <= size for group in groups)
        for group in groups:
            assert (
                len({(plan.evaluated[r].source, plan.evaluated[r].hook_point) for r in group}) == 1
            )
    assert plan.evaluation_groups[: len(plan.training_groups)] == plan.training_groups


def test_another_source_to_evaluate_on_concerns_the_saes_of_one_source() -> None:
    changed = changed_by("evaluation/also_on", {"smollm2": ["python"]})
    assert kinds(changed) == {"evaluation", "baselines", "rivals", "tables", "figure", "report"}
    assert not {job for job in changed if job.split(":")[-1].split("/")[0] in ("python", "scenes")}


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a text and a model's folder of the user's own, made a while ago."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("text.txt", "model/config.json", "model/model.safetensors"):
        write(tmp_path / name, name)
    return tmp_path


def write(path: Path, content: str) -> None:
    """Write a file as it was written an hour ago, a little later each time."""
    before = path.stat().st_mtime if path.exists() else time.time() - 3600
    path.write_text(content)
    os.utime(path, (before + 1, before + 1))


def with_own_data() -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    source = params["sources"]["smollm2"]
    source |= {"model": {"folder": "model"}, "text": {"files": ["text.txt"], "column": "text"}}
    return params


@pytest.mark.parametrize(
    ("name", "first"), [("text.txt", "inputs"), ("model/model.safetensors", "model")]
)
def test_changed_data_changes_the_keys_of_what_reads_it(
    own_data: Path, name: str, first: str
) -> None:
    before = keys(with_own_data())
    write(own_data / name, "as long as"[: len(name)].ljust(len(name)))  # of the same size
    after = keys(with_own_data())
    changed = {job for job in before if before[job] != after[job]}
    assert f"{first}:smollm2" in changed
    assert {"store:smollm2:train", "tables", "report"} <= changed
    assert ("model:smollm2" in changed) == (first == "model")
    assert not any(
        job.split(":")[-1].startswith(("python", "synthetic", "scenes")) for job in changed
    )
    assert any("sae:smollm2" in job for job in changed)


def test_unchanged_data_is_read_once(own_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(with_own_data())
    monkeypatch.setattr("saeflow.local_files.file_digest", lambda path: pytest.fail(f"read {path}"))
    assert keys(with_own_data()) == before
    (own_data / "text.txt").touch()
    with pytest.raises(pytest.fail.Exception, match=r"read text\.txt"):
        keys(with_own_data())


def test_a_file_that_changed_just_now_is_read_again(own_data: Path) -> None:
    path = own_data / "text.txt"
    path.write_text("first")
    state = path.stat()
    first = content_digests({"files": ["text.txt"]})
    path.write_text("other")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # within one tick of a coarse clock
    assert content_digests({"files": ["text.txt"]}) != first
