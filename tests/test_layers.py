"""Imports point one way: each layer may import those before it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "saeflow"
LAYERS = (
    "errors", "device", "installed", "files", "local_files", "progress", "plugins", "failures", "shapes", "config", "provenance", "trace", "sources", "plan", "jobs", "batch",
    "operators", "stores", "complexity", "saes", "training", "tables", "evaluation", "exchange", "figures", "preflight", "needs", "starter", "rehearsal",
    "cli", "__main__",
)  # fmt: skip


def layer(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("saeflow"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("saeflow.")}
    return found


FILES = [path for path in sorted(SRC.rglob("*.py")) if path != SRC / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_only_layers_to_its_left(path: Path) -> None:
    own = LAYERS.index(layer(path))
    wrong = {name for name in imported_layers(path) if LAYERS.index(name) > own}
    assert not wrong


def test_the_document_has_the_same_order() -> None:
    page = (SRC.parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.split("## Where each fact is")[0], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    ranks = [sorted(LAYERS.index(x) for x in re.findall(r"`(\w+)/?`", row)) for row in rows]
    assert sorted(named) == sorted(set(LAYERS) - {"__main__"})
    assert [rank for row in ranks for rank in row] == list(range(len(named)))


def test_the_keys_of_the_demo_need_no_heavy_library() -> None:
    """Every start of Snakemake works them out."""
    code = """
import sys
from pathlib import Path
from saeflow.config import load_params
from saeflow.jobs import Jobs
from saeflow.plan import Plan
Jobs(Plan(load_params(Path("params.yaml")))).work_out_keys()
print(sorted({"torch", "matplotlib", "scipy", "pandas"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SRC.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "module",
    ["saeflow.plan", "saeflow.jobs", "saeflow.preflight", "saeflow.figures", "saeflow.cli"],
)
def test_light_parts_import_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{'torch', 'matplotlib', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_prints_nothing() -> None:
    code = "import saeflow.saes, saeflow.sources, saeflow.stores, saeflow.training, saeflow.figures"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
