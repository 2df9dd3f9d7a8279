"""The code that a job runs: every function, class and constant of the package that its command reaches.

A command names functions and classes, whose bodies name others, in the same module or imported from another one at the
top or where they are used. What is reached this way is the job's code; the rest of the same modules is not.
docs/keys.md states the rule for users.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.config import CARRIED
from saeflow.files import file_digest, json_digest, package_yaml, write_json
from saeflow.jobs import syntax
from saeflow.jobs.syntax import Import, Module, Statement, as_json, from_json, read_module

NAME = "saeflow"
FOLDER = Path(__file__).parents[1]
OUTSIDE = ("provenance", "trace", "errors", "failures", "progress", "jobs")
"""Modules that move, describe and refuse results and decide none: their code is in no key."""
KEPT = Path(importlib.util.cache_from_source(__file__)).with_suffix(".json")
"""Cache of the modules' statements, beside Python's own cache of this module."""
DATA = (".j2", ".yaml")
"""Endings of data files that code opens by their name."""


_READER = file_digest(Path(syntax.__file__))

Node = tuple[str, str | None]
"""A module and a name in it; no name for the statements that run when it is imported."""


@dataclass(frozen=True)
class Step:
    """A node and where its names lead."""

    digest: str
    after: frozenset[Node]
    libraries: frozenset[str]
    data: frozenset[str]


@dataclass(frozen=True)
class Reached:
    """Everything that some functions reach."""

    digest: str
    nodes: frozenset[Node]
    libraries: frozenset[str]
    """Packages of others, by the name under which they are imported."""
    data: frozenset[str]
    """Data files of this package."""

    @functools.cached_property
    def modules(self) -> set[str]:
        """Names of the modules that hold any of it."""
        return {module for module, _ in self.nodes}


class Code:
    """The package's source, from which the code of each job is worked out.

    Args:
        folder: the package.
        kept: file in which `keep` leaves the statements of each module for the next process; None for nowhere. A module
            whose bytes have changed since is read again.
    """

    def __init__(self, folder: Path = FOLDER, kept: Path | None = None) -> None:
        self._kept, self._is_new = kept, False
        self._edits: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        """The file of each module."""
        self._data: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_relative_to(folder / CARRIED):
                continue
            if path.suffix == ".py":
                parts = path.relative_to(folder).with_suffix("").parts
                name = ".".join([NAME, *(parts[:-1] if parts[-1] == "__init__" else parts)])
                self.files[name] = path
            elif path.suffix in DATA:
                self._data[path.name] = path
        self._modules: dict[str, Module] = {}
        self._steps: dict[Node, Step] = {}
        self._known: dict[tuple[frozenset[str], frozenset[tuple[str, str]]], Reached] = {}
        self._data_digests: dict[str, str] = {}

    @property
    def paths(self) -> list[Path]:
        """Every file of the package that may be part of a job's code."""
        return sorted([*self.files.values(), *self._data.values()])

    def edited(self, module: str, text: str) -> "Code":
        """Make a copy in which a module has another text; what the module does not concern is not read again."""
        copy = object.__new__(Code)
        copy.files, copy._data, copy._known = self.files, self._data, {}
        copy._kept, copy._is_new = None, False
        copy._known |= {
            asked: one for asked, one in self._known.items() if module not in one.modules
        }
        copy._data_digests = self._data_digests
        copy._edits = {**self._edits, module: text}
        copy._modules = {name: one for name, one in self._modules.items() if name != module}
        copy._steps = {
            node: step
            for node, step in self._steps.items()
            if module not in {node[0], *(name for name, _ in step.after)}
        }
        return copy

    def reached(self, entries: Iterable[str], choices: Iterable[tuple[str, str]] = ()) -> Reached:
        """Work out what some functions reach.

        Args:
            entries: `module:name`, or a whole `module`, without the package's name.
            choices: (`module:TABLE`, key): of that table the job uses these entries alone. A table for which nothing
                is chosen counts with all of its entries.
        """
        asked = frozenset(entries), frozenset(choices)
        if asked not in self._known:
            self._known[asked] = self._walk(*asked)
        return self._known[asked]

    def module(self, name: str) -> Module:
        """Read a module's statements."""
        if name not in self._modules:
            path = self.files[name]
            source = self._edits[name].encode() if name in self._edits else path.read_bytes()
            digest = hashlib.sha256(source).hexdigest()
            is_package = path.name == "__init__.py"
            known = self._statements_kept.get(name)
            if known is not None and known[0] == digest:
                self._modules[name] = from_json(known[1])
            else:
                module = read_module(source, name, is_package=is_package)
                self._modules[name] = module
                self._statements_kept[name] = [digest, as_json(module)]
                self._is_new = True
        return self._modules[name]

    @functools.cached_property
    def _statements_kept(self) -> dict[str, Any]:
        """By module: the digest of its bytes and its statements."""
        if self._kept is None:
            return {}
        try:
            kept = json.loads(self._kept.read_text(encoding="utf-8"))
            return dict(kept["modules"]) if kept["reader"] == _READER else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # costs the time to read them

    def keep(self) -> None:
        """Write the statements of modules that were read anew.

        Jobs of a cluster may write at once, and the folder may be one that cannot be written to: it is only a cache.
        """
        if self._is_new and self._kept is not None:
            with contextlib.suppress(OSError):
                write_json(self._kept, {"reader": _READER, "modules": self._statements_kept})
            self._is_new = False

    def _walk(self, entries: frozenset[str], choices: frozenset[tuple[str, str]]) -> Reached:
        chosen: dict[Node, list[str]] = {}
        for table, key in sorted(choices):
            chosen.setdefault(_node(table), []).append(key)
        found: dict[Node, Step] = {}
        stack: list[Node] = []
        for entry in entries:
            module, name = _node(entry)
            stack += [(module, name)] if name else self._whole(module)
            if name and name not in self.module(module).defined:
                raise KeyError(f"{entry}: no such name")
        while stack:
            node = stack.pop()
            if node in found:
                continue
            if node in chosen:
                found[node] = self._step(node, self._entries(node, chosen[node]))
            else:
                if node not in self._steps:
                    self._steps[node] = self._step(node, self._statements(node))
                found[node] = self._steps[node]
            stack.extend(found[node].after)
        data = frozenset(name for step in found.values() for name in step.data)
        parts = [sorted(step.digest for step in found.values()), sorted(map(self._digest, data))]
        return Reached(
            digest=_digest_of(parts),
            nodes=frozenset(found),
            libraries=frozenset(name for step in found.values() for name in step.libraries),
            data=data,
        )

    def _statements(self, node: Node) -> list[Statement]:
        module = self.module(node[0])
        return module.effects if node[1] is None else module.defined.get(node[1], [])

    def _entries(self, node: Node, keys: list[str]) -> list[Statement]:
        """Chosen entries of a table that has any; all of it where it is not written as one literal."""
        whole = self._statements(node)
        entries = dict(whole[0].entries) if len(whole) == 1 else {}
        return [entries[key] for key in keys if key in entries] if entries else whole

    def _step(self, node: Node, statements: list[Statement]) -> Step:
        own = node[0]
        module = self.module(own)
        after: set[Node] = {(own, None)}
        data: set[str] = set()
        uses: set[tuple[Import, str | None]] = set()
        for one in statements:
            uses |= one.imports
            after |= {(own, name) for name, _ in one.names if name in module.defined}
            for name, attribute in one.names:
                if name not in module.defined and name in module.imported:
                    uses.add((module.imported[name], attribute))
            for text in one.texts:
                for named in self._modules_named(own, text):
                    after.update(self._whole(named))
            data |= one.texts & self._data.keys()
        if not statements and node[1] in module.imported:  # taken over from another module
            uses.add((module.imported[node[1]], None))
        elif not statements and node[1] is not None and "__getattr__" in module.defined:
            after.update(self._lazy(own, node[1]))
        others = {use for use in uses if use[0].module.split(".")[0] != NAME}
        for use, attribute in uses - others:
            after.update(self._target(use, attribute))
        parts = [
            *map(str, node),
            [one.digest for one in statements],
            sorted([module, str(name)] for module, name in after),
            sorted([use.module, str(use.name), str(attribute)] for use, attribute in others),
        ]
        libraries = frozenset(use.module.split(".")[0] for use, _ in others)
        inside = frozenset(node for node in after if not _is_outside(node[0]))
        return Step(_digest_of(parts), inside, libraries, frozenset(data))

    def _modules_named(self, own: str, text: str) -> list[str]:
        """Find the modules of the same subpackage that a text names, or may name once it is completed."""
        beside = ".".join(own.split(".")[:2])
        if not text.startswith(f"{beside}."):
            return []
        if text.endswith(".*"):
            return [name for name in self.files if name.startswith(text.removesuffix("*"))]
        return [text] if text in self.files else []

    def _target(self, use: Import, attribute: str | None) -> Iterator[Node]:
        """Find what an imported name stands for."""
        whole = use.module if use.name is None else f"{use.module}.{use.name}"
        if whole not in self.files:
            yield use.module, use.name
        elif attribute is None or f"{whole}.{attribute}" in self.files:
            yield from self._whole(whole if attribute is None else f"{whole}.{attribute}")
        else:
            yield whole, attribute

    def _whole(self, module: str) -> Iterator[Node]:
        """Everything that a module defines."""
        yield module, None
        for name in self.module(module).defined:
            yield module, name

    def _lazy(self, package: str, name: str) -> Iterator[Node]:
        """Find what a package's `__getattr__` returns: that name in one of the modules that the package mentions."""
        every = (one for found in self.module(package).defined.values() for one in found)
        texts = {text for one in every for text in one.texts}
        for module in sorted({m for text in texts for m in self._modules_named(package, text)}):
            if name in self.module(module).defined:
                yield module, name

    def _digest(self, data: str) -> str:
        """Digest a data file: YAML by its values, a page's template by its bytes."""
        if data not in self._data_digests:
            path = self._data[data]
            is_yaml = path.suffix == ".yaml"
            content = package_yaml(path) if is_yaml else file_digest(path)
            self._data_digests[data] = json_digest([data, content])
        return self._data_digests[data]


def _node(name: str) -> Node:
    module, _, name = name.partition(":")
    return f"{NAME}.{module}", name


def _digest_of(parts: list[Any]) -> str:
    """Digest nested lists of texts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _is_outside(module: str) -> bool:
    return module.split(".")[1:2] != [] and module.split(".")[1] in OUTSIDE


@functools.cache
def package_code() -> Code:
    """The source of this package, read once."""
    return Code(kept=KEPT)
