"""Results are whole or not there, and their chain holds until a byte of it changes."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from stat import S_IMODE

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from saeflow import provenance
from saeflow.cli import app
from saeflow.errors import UserError
from saeflow.files import atomic_file, replace_folder
from saeflow.provenance import job, record_file
from saeflow.trace import trace


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """text.txt -> results/inputs -> results/store -> results/figure."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text")
    external = {"text.txt": external_digest("text.txt")}
    with provenance.job(Path("results/inputs"), name="prepare", external=external) as job:
        (job.path / "tokens").write_bytes(b"\1\2\3")
    with provenance.job(
        Path("results/store"), name="extract", inputs=[Path("results/inputs")], params={"rows": 3}
    ) as job:
        (job.path / "a.zarr").mkdir()
        (job.path / "a.zarr" / "c0").write_bytes(b"rows")
    with provenance.job(Path("results/figure"), name="draw", inputs=[Path("results/store")]) as job:
        (job.path / "figure.svg").write_text("<svg/>")
    return tmp_path


def external_digest(name: str) -> str | None:
    return provenance.file_digest(Path(name)) if Path(name).exists() else None


def test_trace_walks_down_to_the_text(chain: Path) -> None:
    links = list(trace(Path("results/figure/figure.svg"), external_digest))
    assert [(link.depth, link.job) for link in links] == [
        (0, "draw"),
        (1, "extract"),
        (2, "prepare"),
    ]
    assert "text.txt" in links[-1].facts


@pytest.mark.parametrize(
    "name",
    ["results/figure/figure.svg", "results/store/a.zarr/c0", "results/inputs/tokens", "text.txt"],
)
def test_trace_breaks_when_any_upstream_file_is_edited(chain: Path, name: str) -> None:
    data = bytearray(Path(name).read_bytes())
    data[-1] ^= 1
    Path(name).write_bytes(bytes(data))
    with pytest.raises(UserError, match=name):
        list(trace(Path("results/figure/figure.svg"), external_digest))


@pytest.mark.parametrize("name", ["results/store/a.zarr/c0", "results/inputs/provenance.json"])
def test_trace_breaks_when_an_upstream_file_is_missing(chain: Path, name: str) -> None:
    Path(name).unlink()
    with pytest.raises(UserError, match=Path(name).name):
        list(trace(Path("results/figure"), external_digest))


def test_trace_breaks_when_a_record_is_edited(chain: Path) -> None:
    path = Path("results/store/provenance.json")
    record = json.loads(path.read_text())
    record["params"]["rows"] = 4
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"store/provenance\.json"):
        list(trace(Path("results/figure"), external_digest))


def test_trace_breaks_when_an_upstream_result_was_made_again_differently(chain: Path) -> None:
    with provenance.job(
        Path("results/store"), name="extract", inputs=[Path("results/inputs")]
    ) as job:
        (job.path / "other").write_bytes(b"other rows")
    with pytest.raises(UserError, match="results/store: not the one that results/figure"):
        list(trace(Path("results/figure"), external_digest))


def test_a_job_refuses_a_damaged_input(chain: Path) -> None:
    Path("results/inputs/tokens").write_bytes(b"\1\2")
    with (
        pytest.raises(UserError, match="results/inputs/tokens"),
        provenance.job(Path("results/next"), name="extract", inputs=[Path("results/inputs")]),
    ):
        pass
    assert not Path("results/next").exists()


def test_a_job_refuses_an_input_without_a_record(chain: Path) -> None:
    Path("foreign").mkdir()
    with (
        pytest.raises(UserError, match="foreign"),
        provenance.job(Path("results/next"), name="extract", inputs=[Path("foreign")]),
    ):
        pass


def fail(result: Path, *, resumable: bool) -> None:
    with (
        pytest.raises(RuntimeError),
        provenance.job(result, name="x", params={"a": 1}, resumable=resumable) as job,
    ):
        (job.path / "half").write_text("half")
        raise RuntimeError


def test_a_failed_job_leaves_nothing(tmp_path: Path) -> None:
    fail(tmp_path / "result", resumable=False)
    assert os.listdir(tmp_path) == []


def test_a_resumable_job_finds_what_it_left(tmp_path: Path) -> None:
    fail(tmp_path / "result", resumable=True)
    assert not (tmp_path / "result").exists()
    with provenance.job(tmp_path / "result", name="x", params={"a": 1}, resumable=True) as job:
        assert job.resumed
        assert (job.path / "half").read_text() == "half"
    assert os.listdir(tmp_path) == ["result"]
    assert "job.json" not in provenance.read_record(tmp_path / "result")["outputs"]


def test_other_parameters_start_afresh(tmp_path: Path) -> None:
    fail(tmp_path / "result", resumable=True)
    with provenance.job(tmp_path / "result", name="x", params={"a": 2}, resumable=True) as job:
        assert not job.resumed
        assert not (job.path / "half").exists()


def test_a_single_file_has_its_record_beside_it(chain: Path) -> None:
    report = Path("results/report.html")
    report.write_text("<html/>")
    provenance.record_file(report, name="report", inputs=[Path("results/figure")], params={})
    assert len(list(trace(report, external_digest))) == 4
    report.write_text("<html>edited</html>")
    with pytest.raises(UserError, match=r"report\.html"):
        list(trace(report, external_digest))


def test_a_file_that_no_job_made_is_refused(chain: Path) -> None:
    Path("results/figure/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):
        list(trace(Path("results/figure/mine.txt"), external_digest))


def test_a_result_without_its_record_is_named(chain: Path) -> None:
    with provenance.job(Path("results/new"), name="draw"):
        assert Path("results/new.partial").exists()  # still being made
        found = provenance.results_under(Path("results"))
        assert found == [Path("results") / name for name in ("figure", "inputs", "store")]
    assert provenance.results_under(Path("results/store/a.zarr")) == []  # a part of one
    Path("results/store/provenance.json").unlink()
    with pytest.raises(UserError, match=r"results/store/a\.zarr/c0: expected provenance\.json"):
        provenance.results_under(Path("results"))


def test_results_that_the_report_does_not_rest_on_are_named_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables, report = Path("results/tables"), Path("results/report.html")
    figures = [Path("results/figures") / name for name in ("fvu_l0", "training")]
    for result, read in ((tables, []), *((one, [tables]) for one in figures)):
        with job(result, name="a", inputs=read) as running:
            (running.path / "it.csv").write_text(result.name)
    report.write_text("<p>")
    record_file(report, name="report", inputs=[tables, figures[0]], params={})
    for place, home in ((tmp_path, "results"), (tmp_path / "results", str(tmp_path / "results"))):
        monkeypatch.chdir(place)
        said = CliRunner().invoke(app, ["verify", home]).output
        assert f"{home}/figures/training: left over, {home}/report.html does not rest on it" in said
        assert "4 results are as they were made, 1 of them left over" in said


def test_the_record_says_who_made_it(chain: Path) -> None:
    record = provenance.read_record(Path("results/store"))
    assert record["params"] == {"rows": 3}
    assert record["inputs"] == {"results/inputs": provenance.check(Path("results/inputs"))}
    assert set(record["code"]) == {"digest", "commit", "dirty"}
    assert record["versions"]["numpy"]
    assert len(record["lock"]) == 64


def test_results_of_one_process_share_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 100.0, 180.0, 180.0])
    monkeypatch.setattr(provenance.time, "time", lambda: next(now))
    folders = [tmp_path / name for name in "ab"]
    with ExitStack() as stack:
        jobs = [stack.enter_context(provenance.job(folder, name="train")) for folder in folders]
        jobs[0].share, jobs[1].share = 0.75, 0.25
    records = [provenance.read_record(folder) for folder in folders]
    assert [record["duration_s"] for record in records] == [60, 20]
    assert [record["job_duration_s"] for record in records] == [80, 80]


def test_atomic_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as staged:
        staged.write_text("new, half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_replace_folder_swaps_whole_folders(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == ["new"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_a_result_can_be_read_by_whom_its_folder_can(umask: int, mode: int, tmp_path: Path) -> None:
    """safetensors makes its files readable to their owner alone, whatever the umask; others' files are left alone."""
    (tmp_path / "outside").touch(0o400)
    before = os.umask(umask)
    try:
        with provenance.job(tmp_path / "result", name="train") as job:
            save_file({"x": np.zeros(2)}, job.path / "weights.safetensors")
            (job.path / "below").mkdir()
            (job.path / "below" / "text").touch(0o600)
            (job.path / "link").symlink_to(tmp_path / "outside")
    finally:
        os.umask(before)
    names = ("weights.safetensors", "below/text", "provenance.json")
    assert {S_IMODE((tmp_path / "result" / name).stat().st_mode) for name in names} == {mode}
    assert S_IMODE((tmp_path / "outside").stat().st_mode) == 0o400


def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A git checkout whose one file stands for the package; its commit."""
    package = folder / "src" / "saeflow"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("x = 1\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def test_a_checkout_of_another_user_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkout(tmp_path, monkeypatch)
    assert provenance._git_state() == {"commit": commit, "dirty": False}
    monkeypatch.setattr(os, "environ", {**os.environ, "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"})
    refused = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    assert subprocess.run(refused, check=False, env=os.environ, capture_output=True).returncode
    if os.geteuid() == 0:  # an owner of its own, which no variable pretends
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
    assert provenance._git_state() == {"commit": commit, "dirty": False}
    (tmp_path / "src/saeflow/errors.py").write_text("x = 2\n")
    assert provenance._git_state() == {"commit": commit, "dirty": True}


def test_variables_of_another_repository_s_hook_do_not_lead_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    checkout(other, monkeypatch)
    (tmp_path / "own").mkdir()
    commit = checkout(tmp_path / "own", monkeypatch)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert provenance._git_state()["commit"] == commit


def test_a_copy_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path, monkeypatch)
    copied = tmp_path / "copied" / "saeflow"
    copied.mkdir(parents=True)
    (copied / "errors.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", copied)
    assert provenance._git_state() == {"commit": None, "dirty": None}


def test_a_checkout_that_git_cannot_read_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkout(tmp_path, monkeypatch)
    (tmp_path / ".git" / "HEAD").write_text("no ref\n")
    for _ in range(2):
        assert provenance._git_state()["commit"] is None
    assert caplog.text.count("records name no commit") == 1


def made(result: Path, *, is_killed: bool = False) -> bool:
    """Make a result of one key, or begin it; tell whether the job went on from what was there."""
    with (
        pytest.raises(KeyboardInterrupt) if is_killed else ExitStack(),
        provenance.job(result, name="train", key="k", resumable=True) as job,
    ):
        (job.path / "weights").write_bytes(b"1")
        if is_killed:
            raise KeyboardInterrupt
    return job.resumed


def test_a_result_goes_on_from_what_a_killed_job_of_its_group_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = Path("results/sae")
    made(provenance.ready_of(result), is_killed=True)
    assert not provenance.take_ready(result, "k")
    provenance.take_unfinished(result)
    assert made(result)
    assert [path.name for path in Path("results").iterdir()] == ["sae"]


def test_a_result_that_its_group_made_leaves_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = Path("results/sae")
    made(result, is_killed=True)
    made(provenance.ready_of(result))
    assert provenance.take_ready(result, "k")
    assert [path.name for path in Path("results").iterdir()] == ["sae"]
    assert provenance.is_current(result, "k")
