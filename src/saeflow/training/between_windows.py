"""State of an SAE between two windows of a stream: its checkpoint, how long each window took, and the k that its guide found."""

import shutil
from pathlib import Path

from saeflow.errors import UserError
from saeflow.files import atomic_file, read_json, write_json
from saeflow.training.checkpoints import checkpoints

_FACTS = "stream.json"


def open_state(folder: Path, key: str) -> None:
    """Make the folder of an SAE's state; a state of another key is deleted.

    Args:
        folder: beside the SAE's own.
        key: of the job that makes the SAE.
    """
    if _seconds(folder, key) is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / _FACTS, {"key": key, "seconds": {}})


def add_seconds(folder: Path, window: int, seconds: float) -> None:
    """Note how long training on a window took."""
    facts = read_json(folder / _FACTS)
    facts["seconds"][str(window)] = round(seconds, 2)
    write_json(folder / _FACTS, facts)


def note_k(folder: Path, k: int) -> None:
    """Note the k that an SAE's guide found on the first window, which later windows cannot tell."""
    write_json(folder / _FACTS, {**read_json(folder / _FACTS), "k": k})


def noted_k(folder: Path) -> int | None:
    """The k that was noted, if one was."""
    found: int | None = read_json(folder / _FACTS).get("k")
    return found


def taken_over(folder: Path, key: str, place: Path) -> dict[str, float]:
    """Copy the state after the last window to where the SAE is made.

    Returns:
        Seconds of training on each window.

    Raises:
        UserError: there is no state of this key.
    """
    seconds = _seconds(folder, key)
    if seconds is None:
        raise UserError(
            f"{folder}: expected the state of training after the last window, found none of these parameters and code. "
            "Delete results/saes.groups, and run the workflow again."
        )
    for path in checkpoints(folder):
        with atomic_file(place / path.name) as staged:
            shutil.copyfile(path, staged)
    return seconds


def _seconds(folder: Path, key: str) -> dict[str, float] | None:
    """Seconds of each window so far; None where there is no state of this key."""
    if not (folder / _FACTS).exists():
        return None
    facts = read_json(folder / _FACTS)
    return dict(facts["seconds"]) if facts["key"] == key else None
