"""English that every Python brings along: its language reference and the docstrings of its library.

Files are parsed with `ast`, never imported. The text depends on the Python version; `digest` tells.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TOPICS = Path("pydoc_data") / "topics.py"
LEFT_OUT = {
    "__pycache__", "_bundled", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
"""Folders that are not part of the library, are its tests, or hold no prose."""
MIN_CHARACTERS = 200
"""A module with fewer characters of docstrings is left out."""


@cache
def documents() -> tuple[str, ...]:
    """Topics of the language reference, then one document per library module, in a fixed order."""
    return tuple(_read())


def _read() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    yield from _topics(library / TOPICS)
    for path in sorted(
        library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()
    ):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            text = _docstrings(path)
            if len(text) >= MIN_CHARACTERS:
                yield text


def _parse(path: Path) -> ast.Module | None:
    """A file's syntax tree; None for the few files that are no Python 3 source (templates)."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def _topics(path: Path) -> Iterator[str]:
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield text.strip()


def _docstrings(path: Path) -> str:
    """The docstrings of a file's module, classes and functions, in the order of the file."""
    tree = _parse(path)
    if tree is None:
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


@cache
def digest() -> str:
    """SHA-256 (hex) of the documents of this Python."""
    total = hashlib.sha256()
    for text in documents():
        total.update(text.encode("utf-8", "replace") + b"\0")
    return total.hexdigest()
