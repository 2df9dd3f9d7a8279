"""A rehearsal runs the real workflow, offline, and ends in a marked report of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.config import ROOT, load_params

pytestmark = [pytest.mark.workflow, pytest.mark.heavy]
FIGURES = ["fvu_l0", "table_training_cost"]


def preset() -> dict[str, Any]:
    """Two entries on a hub's model and data set; nothing of it is on this machine."""
    params = load_params(ROOT / "presets" / "sparsemax-text.yaml")
    params["saes"] = {name: params["saes"][name] for name in ("topk", "sparsemax")}
    for values in params["saes"].values():
        values |= {"d_sae": 24576, "seed": 0}
    params["complexity"] = {}
    params["figures"]["names"] = FIGURES
    return params


class Rehearsed:
    def __init__(self, folder: Path) -> None:
        self.folder, self.params = folder, preset()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of `saeflow rehearse`, or of another command in the rehearsal's folder."""
        (self.folder / "paper.yaml").write_text(yaml.safe_dump(self.params))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "saeflow",
                *(arguments or ("rehearse", "paper.yaml", "--cores", "2")),
            ],
            cwd=self.folder / "rehearsals/paper" if arguments else self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    made = Rehearsed(tmp_path_factory.mktemp("rehearsal"))
    code, said = made.run()
    assert code == 0, said
    assert (
        "rehearsals/paper/results/report.html: 2 entries, 2 of 2 runs, 2 figures and tables" in said
    )
    assert "Not rehearsed: fetching " in said
    assert "openai-community/gpt2" in said
    return made


def test_everything_lies_in_its_own_folder(rehearsed: Rehearsed) -> None:
    assert {path.name for path in rehearsed.folder.iterdir()} == {"paper.yaml", "rehearsals"}
    assert [path.name for path in (rehearsed.folder / "rehearsals").iterdir()] == ["paper"]


def test_report_figures_and_tables_say_what_they_are(rehearsed: Rehearsed) -> None:
    results = rehearsed.folder / "rehearsals/paper/results"
    report = (results / "report.html").read_text()
    assert "<title>REHEARSAL: saeflow report</title>" in report
    assert '<p class="mark">REHEARSAL</p>' in report
    for name in FIGURES:
        assert (results / f"figures/{name}/caption.md").read_text().startswith("REHEARSAL. ")
    assert (
        "REHEARSAL" in (results / "figures/table_training_cost/table_training_cost.tex").read_text()
    )


def test_its_results_trace_to_the_stand_ins(rehearsed: Rehearsed) -> None:
    code, said = rehearsed.run("trace", "results/figures/fvu_l0/fvu_l0.svg")
    assert code == 0, said
    assert "inputs/models/gpt2-" in said
    code, said = rehearsed.run("verify")
    assert code == 0, said


def test_training_that_diverges_is_one_line(rehearsed: Rehearsed) -> None:
    """The rehearsal goes on from what is there, and finds it before any hour of a GPU is spent."""
    rehearsed.params["training"]["lr"] = 1e30
    code, said = rehearsed.run()
    assert code in (1, 2), said  # a selection may refuse the scores before the loss is looked at
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: paper.yaml: rule train_group")
    assert "finite" in line or "NaN" in line
    assert "rehearsals/paper/logs/train_group/" in line
    assert "Traceback" not in said


def test_a_mistake_in_the_preset_is_one_line(rehearsed: Rehearsed) -> None:
    rehearsed.params["saes"]["topk"]["options"]["k"] = 0
    code, said = rehearsed.run()
    assert code == 2
    assert said.startswith("error: paper.yaml: saes.topk.options.k: ")
    assert len(said.splitlines()) == 1
