"""Docstrings state a subject or an action: they do not open with a question word or a preposition."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "docs")
OPENINGS = re.compile(r"(What|Which|How|Whether|Where|Of|That)\b")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", "module"), ast.get_docstring(node) or ""
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):  # below an assignment or attribute
                yield f"line {node.lineno}", text


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_open_with_a_subject_or_a_verb(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*.py") if ".venv" not in str(path)]
    assert paths
    wrong = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in paths
        for name, text in docstrings(path)
        if OPENINGS.match(text)
    ]
    assert not wrong
