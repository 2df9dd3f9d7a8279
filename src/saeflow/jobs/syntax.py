"""The top-level statements of a module, each with the digest of its meaning and the names that it uses.

Comments, docstrings, formatting, messages (texts of raised errors, calls of the logger) and descriptions of options, of
the command line and of variants, are no part of the meaning.
"""

import ast
import copy
import functools
import hashlib
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LOGGERS = ("logger", "logging")
_OPTIONS = ("Option", "Argument")
_OPTION_OF_A_VARIANT = "option"
_LEFT_OUT = ("ctx", "kind", "type_comment")
"""Fields of syntax nodes that say nothing of the meaning."""


@dataclass(frozen=True)
class Import:
    """A name that an import binds: a module, or a name in one."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Statement:
    """A top-level statement: its meaning and what it uses."""

    digest: str
    names: frozenset[tuple[str, str | None]]
    """Names of the module, each with the attribute that is taken of it; None where the name itself is used."""
    imports: frozenset[tuple[Import, str | None]]
    """Imports inside the statement, with the attribute that is taken of each, if that is all that is used."""
    texts: frozenset[str]
    """Strings in it: each may name a module or a data file of the package."""
    entries: tuple[tuple[str, "Statement"], ...]
    """The statement for each key alone of a table (a dictionary with literal keys)."""


@dataclass(frozen=True)
class Module:
    """The statements of a module."""

    defined: dict[str, list[Statement]]
    """By the name that they bind."""
    imported: dict[str, Import]
    effects: list[Statement]
    """Statements that bind no name: they run whenever the module is imported."""


def as_json(module: Module) -> list[Any]:
    """Write down a module in lists and texts, each statement once; `from_json` reads it."""
    every = {id(one): one for one in module.effects}
    every |= {id(one): one for found in module.defined.values() for one in found}
    number = {own: place for place, own in enumerate(every)}
    return [
        [_statement_as_json(one) for one in every.values()],
        {name: [number[id(one)] for one in found] for name, found in module.defined.items()},
        {name: [one.module, one.name] for name, one in module.imported.items()},
        [number[id(one)] for one in module.effects],
    ]


def from_json(written: list[Any]) -> Module:
    """Read a module that `as_json` wrote."""
    statements, defined, imported, effects = written
    every = [_statement_from_json(one) for one in statements]
    return Module(
        {name: [every[place] for place in places] for name, places in defined.items()},
        {name: Import(*one) for name, one in imported.items()},
        [every[place] for place in effects],
    )


def _statement_as_json(one: Statement) -> list[Any]:
    imports = [[use.module, use.name, attribute] for use, attribute in one.imports]
    entries = [[key, _statement_as_json(entry)] for key, entry in one.entries]
    return [one.digest, list(map(list, one.names)), imports, list(one.texts), entries]


def _statement_from_json(written: list[Any]) -> Statement:
    digest, names, imports, texts, entries = written
    return Statement(
        digest,
        frozenset((name, attribute) for name, attribute in names),
        frozenset((Import(module, name), attribute) for module, name, attribute in imports),
        frozenset(texts),
        tuple((key, _statement_from_json(entry)) for key, entry in entries),
    )


@functools.cache
def read_module(source: bytes, name: str, *, is_package: bool) -> Module:
    """Read a module.

    Args:
        source: its text.
        name: its full name, for relative imports and `__name__`.
        is_package: it is a package's `__init__`.

    Raises:
        SyntaxError: the text is no Python.
    """
    tree = ast.parse(source)
    tables = symtable.symtable(source.decode(), name, "exec").get_children()
    package = name if is_package else name.rpartition(".")[0]
    module = Module({}, {}, [])
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imported.update(_bound_by(node, package))
            continue
        if _is_for_types_only(node) or _is_text(node):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        inside = [t for t in tables if first <= t.get_lineno() <= (node.end_lineno or first)]
        own = _global_names(node, inside)
        bound = [name for name in _binds(node) if name != "__all__"]
        statement = _statement(node, own, package, name)
        for one in bound:
            module.defined.setdefault(one, []).append(statement)
        for one in _changes(node):
            module.defined.setdefault(one, []).append(statement)
        if not _binds(node):
            module.effects.append(statement)
    return module


def _statement(node: ast.stmt, own: set[str], package: str, module: str) -> Statement:
    bare = _Meaning().visit(node)
    assert isinstance(bare, ast.stmt)
    inner: dict[str, Import] = {}
    taken: set[tuple[str, str | None]] = set()
    within: set[int] = set()
    texts: set[str] = set()
    for one in ast.walk(bare):
        match one:
            case ast.Import() | ast.ImportFrom():
                inner |= dict(_bound_by(one, package))
            case ast.Attribute(value=ast.Name() as base):
                taken.add((base.id, one.attr))
                within.add(id(base))
            case ast.Name(ctx=ast.Load()) if id(one) not in within:
                taken.add((one.id, None))
            case ast.Constant(value=str() as text):
                texts.add(text)
            case ast.JoinedStr():
                texts.add(_beginning(one, module))
    entries = []
    for key, alone in _entries(bare):
        entries.append((key, _statement(alone, own, package, module)))
    return Statement(
        digest=hashlib.sha256(meaning(bare).encode()).hexdigest(),
        names=frozenset(use for use in taken if use[0] in own and use[0] not in inner),
        imports=frozenset((inner[name], attribute) for name, attribute in taken if name in inner)
        | frozenset(
            (one, None) for name, one in inner.items() if name not in {n for n, _ in taken}
        ),
        texts=frozenset(texts),
        entries=tuple(entries),
    )


def meaning(node: Any) -> str:
    """Write a syntax tree as text, the same for every version of Python that has its nodes."""
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={meaning(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _LEFT_OUT and value is not None and value != []
        )
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(meaning, node))}]"
    return repr(node)


class _Meaning(ast.NodeTransformer):
    """Takes out what changes no result."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if _is_text(node) or _is_log(node.value):
            return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for one in ast.walk(node):
            for name, value in ast.iter_fields(one):
                if isinstance(value, list):
                    setattr(one, name, [_silent(part) for part in value])
                elif isinstance(value, ast.AST):
                    setattr(one, name, _silent(value))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if called in _OPTIONS:
            node.keywords = [one for one in node.keywords if one.arg != "help"]
        if isinstance(node.func, ast.Name) and node.func.id == _OPTION_OF_A_VARIANT:
            node.args = [_silent(one) for one in node.args[:1]] + node.args[1:]
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:  # all that it held was left out
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _silent(node: Any) -> Any:
    """An empty text in the place of a message."""
    is_text = isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return ast.Constant("") if is_text else node


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_log(node: ast.expr) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(called, ast.Attribute)
        and isinstance(called.value, ast.Name)
        and called.value.id in _LOGGERS
    )


def _is_for_types_only(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _beginning(node: ast.JoinedStr, module: str) -> str:
    """The fixed beginning of a text that is completed when it runs."""
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "__name__":
            text += module
        else:
            return text + "*"
    return text


def _bound_by(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Import]]:
    """The names that an import binds."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or whole, Import(alias.name, None)
        else:
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*parts, *filter(None, [node.module])]) if node.level else node.module
            yield alias.asname or alias.name, Import(module or "", alias.name)


def _binds(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds, also inside `if`, `try` and `with`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    found = []
    stack: list[ast.AST] = [node]
    while stack:
        one = stack.pop()
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(one.name)
            continue
        if isinstance(one, ast.Lambda):
            continue
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            found.append(one.id)
        if isinstance(one, ast.Import | ast.ImportFrom):
            found += [name for name, _ in _bound_by(one, "")]
        stack.extend(ast.iter_child_nodes(one))
    return found


def _changes(node: ast.stmt) -> list[str]:
    """The module's names that a function assigns (`global`)."""
    return [name for one in ast.walk(node) if isinstance(one, ast.Global) for name in one.names]


def _global_names(node: ast.stmt, inside: list[symtable.SymbolTable]) -> set[str]:
    """The names of a statement that are the module's, not a function's own."""
    found: set[str] = set()
    stack = list(inside)
    while stack:
        table = stack.pop()
        is_class = table.get_type() == "class"
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or is_class):
                found.add(symbol.get_name())
        stack.extend(table.get_children())
    outside: list[ast.AST] = [node]
    while outside:  # what runs in the module's own scope
        one = outside.pop()
        if isinstance(one, ast.Name):
            found.add(one.id)
        for name, value in ast.iter_fields(one):
            if name == "body" and isinstance(
                one, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
            ):
                continue
            values = value if isinstance(value, list) else [value]
            outside.extend(part for part in values if isinstance(part, ast.AST))
    return found


def _entries(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """Make a statement of each entry of a table with literal keys."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
        return
    table = node.value
    names = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    if len(names) == len(table.keys) > 1:
        for name, key, value in zip(names, table.keys, table.values, strict=True):
            alone = copy.copy(node)
            alone.value = ast.Dict(keys=[key], values=[value])
            yield str(name), alone
