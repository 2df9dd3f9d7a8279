"""Every kind of source keeps the same contract."""

from dataclasses import fields
from pathlib import Path

import pytest

from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import KINDS, SourceKind, check_source, external_digest, kind_named


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_states_its_facts_in_one_record(name: str) -> None:
    kind = kind_named(name)
    for step in ("check", "external_inputs", "prepare_inputs", "open", "inputs"):
        assert callable(getattr(kind, step))
    assert {field.name for field in fields(SourceKind)} <= set(dir(kind))
    assert kind.has_labelled_sets + kind.predicts_contexts == (kind.in_model is not None)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        UserError, match="expected one of synthetic, synthetic_world, text, vision, found 'audio'"
    ):
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
