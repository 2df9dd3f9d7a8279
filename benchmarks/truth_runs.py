"""Runs of `truth.py` that are kept: each is computed once for its settings, and says when and by which code."""

import datetime
import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import RESULTS

FILE = RESULTS / "truth_runs.jsonl"


def key_of(settings: Mapping[str, Any]) -> str:
    """Return the key of a run: a digest of all that its settings say."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return the runs that are kept, by key; of a key that was run twice, the later."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {run["key"]: run for run in map(json.loads, lines)}


def keep(key: str, rows: Sequence[Mapping[str, Any]], file: Path = FILE) -> dict[str, Any]:
    """Append a run: its measurements, one row a control, with the day and the commit of the code."""
    run = {"key": key, "date": str(datetime.date.today()), "commit": commit(), "rows": list(rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(run, sort_keys=True) + "\n")
    return run


@functools.cache
def commit() -> str:
    """Return the short name of the commit that the code is of, with a + where files of src/ differ from it.

    The first call decides: files that change later are not the code that is running.
    """
    git = ["git", "-C", str(Path(__file__).parents[1])]
    head, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False)
        for arguments in (("rev-parse", "--short=7", "HEAD"), ("status", "--porcelain", "src"))
    )
    if head.returncode or changed.returncode:
        return "no commit"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
