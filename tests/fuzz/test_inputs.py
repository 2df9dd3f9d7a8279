"""Inputs from outside, changed at random: the right result, or one line that names the file."""

from pathlib import Path

import pytest

from . import inputs

COUNT, SEED = 500, 20261126


def test_changed_inputs_are_read_right_or_refused_in_a_line() -> None:
    wrong: list[str] = []
    tried = inputs.try_inputs(
        COUNT, SEED, lambda kind, number, what: wrong.append(f"{kind} {number}: {what}")
    )
    print(f"seed {SEED}, {tried}")  # noqa: T201
    assert not wrong, f"seed {SEED} (python -m inputs --seed {SEED} --one KIND NUMBER): {wrong[:5]}"
    assert sum(tried.values()) >= COUNT - len(tried)


def test_a_reader_that_makes_text_of_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Path) -> list[str]:
        import pyarrow.parquet

        return [str(cell) for cell in pyarrow.parquet.read_table(path)["text"].to_pylist()]

    monkeypatch.setattr(inputs.documents, "documents_of", careless)
    with pytest.raises(inputs.WrongError):
        for number in range(40):
            inputs.try_one("parquet", 0, number)


def test_a_reader_that_ignores_an_activation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from saeflow.exchange import saelens

    monkeypatch.setattr(saelens, "_architecture", lambda path, config: ("standard", None))
    with pytest.raises(inputs.WrongError, match="latents"):
        for number in range(40):
            inputs.try_one("SAELens SAE", 0, number)


def test_memory_beyond_the_bound_is_caught(tmp_path: Path) -> None:
    with pytest.raises(inputs.WrongError, match="MemoryError"):
        inputs.reading.read(lambda: bytearray(3 << 30), tmp_path)
