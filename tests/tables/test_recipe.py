"""A new metric touches its function and the metric table; a new figure is one file."""

import shutil
import subprocess
import sys
from pathlib import Path

import saeflow

SOURCE = Path(saeflow.__file__).parent
RECIPE = """
import json, sys
from pathlib import Path
import torch
from saeflow.evaluation.sparsity import Sparsity
from saeflow.figures import draw
from saeflow.figures.report import write_report
from saeflow.tables.collect import collect
from saeflow.tables.document import document
from saeflow.tables.evaluations import Evaluation, write_evaluation

root = Path(sys.argv[1])
results = []
for seed in (0, 1):
    sums = Sparsity(4)
    sums.add((torch.rand(64, 4, generator=torch.Generator().manual_seed(seed)) > 0.5).float())
    policy = {"rows": 64.0, "excluded_rows_fraction": 0.0, "first_position_excluded": 0.0}
    ids = {
        "run": f"toy/features/topk/d4-k2-seed{seed}", "source": "toy", "hook_point": "features", "entry": "topk",
        "variant": "topk", "schedule": "constant", "d_sae": 4, "k": 2, "seed": seed, "tokens": 100,
    }
    results.append((ids, Evaluation("toy", policy | sums.metrics(), sums.histograms())))
for folder in ("evaluation", "tables"):
    (root / folder).mkdir()
write_evaluation(root / "evaluation", results)
collect([root / "evaluation"], [], [], root / "tables")
draw("toy", root / "tables", {"allow_unequal_budgets": False}, root / "figures" / "toy")
write_report(root / "tables", [root / "figures" / "toy"], [], root / "report.html")
(root / "tables.md").write_text(document())
"""
FIGURE = '''"""A toy figure."""

from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.tables.schema import axis_label


def draw(tables, options):
    figure = style.new_figure(2, 2)
    axes = figure.subplots()
    axes.plot(tables.wide["l0_mean"], tables.wide["toy"], "o")
    axes.set_ylabel(axis_label("toy"))
    return Drawing(figure, tables.wide[["run", "toy"]], f"{axis_label('toy')}. A caption.")


FIGURE = Figure(title="A toy figure's title", draw=draw)
'''


def changed_files(copy: Path) -> set[str]:
    """Files of a copy of the package that differ from the package's own, or are new."""
    return {
        path.relative_to(copy).as_posix()
        for path in copy.rglob("*.py")
        if not (SOURCE / path.relative_to(copy)).exists()
        or path.read_bytes() != (SOURCE / path.relative_to(copy)).read_bytes()
    }


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_toy_metric_and_a_toy_figure_appear_everywhere(tmp_path: Path) -> None:
    copy = tmp_path / "src" / "saeflow"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    replace(
        copy / "evaluation" / "sparsity.py",
        '            "l0_median": self.quantile(0.5),\n',
        '            "l0_median": self.quantile(0.5),\n            "toy": 3 * self.quantile(0.5),\n',
    )
    replace(
        copy / "tables" / "metrics.py",
        "METRICS: dict[str, Metric] = {\n",
        "METRICS: dict[str, Metric] = {\n"
        '    "toy": Metric(label="toy score", unit="points", definition="Three times the median.", summary="mean", printed=True),\n',
    )
    (copy / "figures" / "plots" / "toy.py").write_text(FIGURE)
    assert changed_files(copy) == {
        "evaluation/sparsity.py", "tables/metrics.py", "figures/plots/toy.py"
    }  # fmt: skip
    root = tmp_path / "results"
    root.mkdir()
    subprocess.run(
        [sys.executable, "-c", RECIPE, str(root)],
        env={"PYTHONPATH": str(copy.parent), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    read = {
        path.relative_to(root).as_posix(): path.read_text()
        for path in root.rglob("*")
        if path.suffix in (".csv", ".md", ".tex", ".html", ".json")
    }
    assert read["tables/metrics.csv"].count(",toy,6") == 2
    assert '"toy":' in read["tables/metrics.json"]
    assert "toy_mean,toy_sd" in read["tables/summary.csv"]
    for name in ("tables/summary.md", "tables/summary.tex"):
        assert "toy score (points)" in read[name]
        assert "6.00" in read[name]
    assert "toy score" in read["report.html"]
    assert "A toy figure&#39;s title" in read["report.html"]
    assert "| `toy` | toy score | Three times the median. | points |" in read["tables.md"]
    assert "toy score (points)" in read["figures/toy/caption.md"]
