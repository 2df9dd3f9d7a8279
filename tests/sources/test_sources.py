"""Every kind of source keeps the same contract."""

import importlib
from pathlib import Path

import pytest

from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import KINDS, check_source, external_digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_a_module_with_four_functions(kind: str) -> None:
    module = importlib.import_module(KINDS[kind])
    for name in ("check", "external_inputs", "prepare_inputs", "open_source"):
        assert callable(getattr(module, name))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="expected one of synthetic, text, vision, found 'audio'"):
        check_source("s", {"kind": "audio"}, Path())


def test_the_present_digest_of_what_came_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert external_digest(str(path)) == file_digest(path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: the file is missing"):
        external_digest(str(path))
    for pinned in ("hub:someone/tiny", "wheel:tiny-model==1.0", "dataset:someone/stories"):
        assert external_digest(pinned) is None
