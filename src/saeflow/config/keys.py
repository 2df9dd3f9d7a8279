"""The key of a job: a digest of its parameters, its code, the pinned libraries and the jobs before it."""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from saeflow.config.schema import ROOT
from saeflow.files import json_digest
from saeflow.local_files import content_digests

PACKAGE = Path(__file__).parents[1]


def source_files(folder: Path) -> list[Path]:
    """Python files and page templates below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".j2"))


@functools.cache
def source_digest(*parts: str) -> str:
    """SHA-256 of the source files of the named modules and subpackages of saeflow."""
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        files = source_files(path) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            digest.update(file.relative_to(PACKAGE).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def pins_digest(*packages: str) -> str:
    """SHA-256 of the pinned versions of some packages in the lock."""
    lock = ROOT / "requirements.lock"
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE))
    return json_digest({package: pins.get(package) for package in packages})


def job_key(
    rule: str, params: Any, *, code: tuple[str, ...], libraries: tuple[str, ...], after: list[str]
) -> str:
    """The digest that decides whether a job runs again.

    Args:
        rule: its name.
        params: the job's own slice of the parameters; local files that it names count by their content.
        code: subpackages it runs.
        libraries: packages whose pinned version can change its result.
        after: keys of the jobs it builds on.
    """
    parts = [rule, params, source_digest(*code), pins_digest(*libraries), sorted(after)]
    if contents := content_digests(params):
        parts.append(contents)
    return json_digest(parts)[:20]
