"""The lines that end a failed run are of the jobs that failed, not of those that a later try finished."""

from pathlib import Path

import pytest

from saeflow.failures import failures

# As Snakemake 9 writes it, with --retries.
LOG = """\
[Thu Nov 26 17:34:58 2026]
Error in rule train_sae:
    message: None
    jobid: 1
    output: results/saes/a/provenance.json
    log: logs/train_sae/a.log (check log file(s) for error details)
    shell:
        python -m saeflow train
        (command exited with non-zero exit code)
Trying to restart job 1.
[Thu Nov 26 17:35:58 2026]
Error in rule draw_figure:
    message: None
    jobid: 12
    output: results/figures/f/f.svg
    log: logs/draw_figure/f.log (check log file(s) for error details)
    shell:
        python -m saeflow draw
        (command exited with non-zero exit code)
[Thu Nov 26 17:36:58 2026]
Finished jobid: {finished} (Rule: train_sae)
"""


@pytest.mark.parametrize(("finished", "expected"), [(1, ["draw_figure"]), (2, ["train_sae", "draw_figure"])])  # fmt: skip
def test_a_job_that_a_later_try_finished_is_no_failure(
    finished: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train_sae/a", "draw_figure/f"):
        log = Path("logs", f"{name}.log")
        log.parent.mkdir(parents=True)
        log.write_text(f"12:00:00 begins\nerror: of {name}\n")
    Path("run.log").write_text(LOG.format(finished=finished))
    found = failures([Path("run.log")])
    assert [line.split("[")[1].split(";")[0] for line in found] == expected
    assert (
        found[-1] == "error: of draw_figure/f [draw_figure; the whole log: logs/draw_figure/f.log]"
    )


def test_progress_of_a_killed_job_is_not_given_for_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("logs/draw_figure").mkdir(parents=True)
    Path("logs/draw_figure/f.log").write_text("12:00:00 step 3 of 9\n\n")
    Path("run.log").write_text(LOG.format(finished=1))
    (found,) = failures([Path("run.log")])
    assert found.startswith(
        "error: the job ended without a message. Its last line: 12:00:00 step 3 of 9 ["
    )
