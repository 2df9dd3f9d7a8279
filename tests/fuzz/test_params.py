"""Any parameter file is either valid or refused in one line; nothing in between."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saeflow.cli.parameters import validate
from saeflow.config import load_params
from saeflow.errors import UserError

ROOT = Path(__file__).parents[2]
PARAMS = {name: load_params(ROOT / name) for name in ("params.yaml", "presets/tiny.yaml")}

NASTY = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**63, 10**30, 0.5, -0.5, 1e308, float("inf"), float("nan"), "", " ", "x", "1",
        "nan", "../../etc", "/", "$(touch x)", "`x`", "a'b\"c", "a\nb", "\x00", "ö🙂", "x" * 5000, [], {}, [[]], [{}],
        {"kind": "constant"}, {"kind": "x"}, {"from": 1}, [1, 1], [None], {"": 1}, {"a": {"b": [1]}},
    ]
)  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of mappings and lists."""
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [at, *(path for key, child in children for path in paths(child, (*at, key)))]


def mutate(params: Any, data: st.DataObject) -> Any:
    """One change at a random place: another value, nothing, a further key, or another name."""
    *parents, last = data.draw(st.sampled_from(paths(params)[1:]))
    node = params
    for key in parents:
        node = node[key]
    kind = data.draw(st.sampled_from(["value", "nasty", "delete", "add", "rename"]))
    if kind == "delete":
        del node[last]
    elif kind in ("add", "rename") and isinstance(node, dict):
        name = data.draw(NASTY.filter(lambda v: not isinstance(v, list | dict)))
        node[name] = node.pop(last) if kind == "rename" else data.draw(ANY)
    else:
        node[last] = data.draw(NASTY if kind == "nasty" else ANY)
    return params


def refused(path: Path, text: bytes) -> str | None:
    """Return the error of `saeflow validate` on a parameter file, None where it is valid."""
    path.write_bytes(text)
    try:
        validate(path)
    except UserError as error:
        return str(error)
    return None


@given(name=st.sampled_from(sorted(PARAMS)), changes=st.integers(1, 3), data=st.data())
def test_changed_parameters_are_valid_or_refused_in_a_line(
    tmp_path: Path, name: str, changes: int, data: st.DataObject
) -> None:
    params: Any = copy.deepcopy(PARAMS[name])
    for _ in range(changes):
        params = mutate(params, data)
    said = refused(tmp_path / "params.yaml", yaml.safe_dump(params, allow_unicode=True).encode())
    assert said is None or said.strip()


@given(
    text=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda s: s.encode(errors="surrogatepass"))
)
def test_any_bytes_are_refused(tmp_path: Path, text: bytes) -> None:
    assert refused(tmp_path / "params.yaml", text)


@pytest.mark.parametrize("place", ["saes", "sources", "stores"])
@pytest.mark.parametrize(
    "name", ["a b", "$(touch x)", "..", "../x", "a/b", "ö", "'", "-x", "", "A" * 300]
)
def test_names_that_a_shell_or_a_path_could_misread_are_refused(
    place: str, name: str, tmp_path: Path
) -> None:
    params: Any = copy.deepcopy(PARAMS["presets/tiny.yaml"])
    first = next(iter(params[place]))
    params[place] = {name if key == first else key: value for key, value in params[place].items()}
    said = refused(tmp_path / "params.yaml", yaml.safe_dump(params, allow_unicode=True).encode())
    assert said
