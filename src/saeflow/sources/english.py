"""Text that every Python brings along: English (its language reference, its docstrings), and its library's source.

Files are parsed with `ast`, never imported. The text depends on the Python version; `digest` tells.
"""

import ast
import hashlib
import sysconfig
import tokenize
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
"""A module with fewer characters (of docstrings) is left out."""


@cache
def documents(kind: str = "english") -> tuple[str, ...]:
    """In a fixed order: english, topics of the language reference and then one document per library module;
    python, the modules' source.
    """
    return tuple(_english() if kind == "english" else _source())


def topics() -> int:
    """Return the number of English documents that are topics of the language reference."""
    return sum(1 for _ in _topics(_library() / TOPICS))


def left_out(kind: str = "english") -> dict[str, int]:
    """Count the library's modules that give no document, by the reason."""
    given = len(documents(kind)) - (topics() if kind == "english" else 0)
    what = "of docstrings " if kind == "english" else ""
    reason = f"a module with less than {MIN_CHARACTERS} characters {what}(or no Python source)"
    count = sum(1 for _ in _modules()) - given
    return {reason: count} if count else {}


def _english() -> Iterator[str]:
    yield from _topics(_library() / TOPICS)
    for path in _modules():
        text = _docstrings(path)
        if len(text) >= MIN_CHARACTERS:
            yield text


def _source() -> Iterator[str]:
    for path in _modules():
        text = _decoded(path)
        if text is not None and len(text) >= MIN_CHARACTERS:
            yield text


def _decoded(path: Path) -> str | None:
    """A module's text in the encoding it declares; None for the few files that are no Python source."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[Path]:
    """The library's modules in order of their paths."""
    library = _library()
    for path in sorted(
        library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()
    ):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            yield path


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
def digest(kind: str = "english") -> str:
    """SHA-256 (hex) of the documents of this Python."""
    total = hashlib.sha256()
    for text in documents(kind):
        total.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()
