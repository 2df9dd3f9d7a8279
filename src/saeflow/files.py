"""Files that are either whole or not there: atomic writes, canonical JSON, digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError

_READ_BYTES = 1 << 22


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield staged
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def replace_folder(staged: Path, folder: Path) -> None:
    """Put the finished folder `staged` in the place of `folder`, readable to whom the folder is."""
    _share(staged)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give the files of a folder the folder's own permissions: safetensors makes its files for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            if not path.is_symlink() and path.stat().st_mode & 0o666 != mode:
                path.chmod(mode)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, fixed indent, no NaN."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, atomically."""
    with atomic_file(path) as staged:
        staged.write_text(canonical_json(value), encoding="utf-8")


def package_yaml(path: Path) -> Any:
    """Read a YAML file of this package, by libyaml where PyYAML was built with it: ten times faster."""
    return yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def parse_json(name: str, text: str) -> Any:
    """Read JSON that a command was given.

    Args:
        name: of the argument, for messages.

    Raises:
        UserError: the text is not JSON, or holds NaN or an infinite number.
    """

    def refuse(constant: str) -> Any:
        raise UserError(f"{name}: expected finite numbers, found {constant}.")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: expected JSON, found {text[:60]!r} ({error}).") from None


def missing_file(path: Path) -> UserError:
    """Return the error of a file that is not there: a result has a step that makes it, another file has none."""
    is_result = "results" in path.parts
    what = f"Run the step that makes it (snakemake {path})." if is_result else "Fix the path."
    return UserError(f"{path}: no such file. {what}")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file(path) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        is_result = "results" in path.parts
        what = "Delete the file and rerun its step." if is_result else "Give a whole one."
        raise UserError(f"{path}: expected JSON, found {error}. {what}") from None


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted; links to folders are followed, but not into a folder that holds them.

    Raises:
        UserError: a folder cannot be read, or a link points to nothing.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}). Fix its permissions."
        )

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place)
        above = {one.resolve() for one in (here, *here.parents)}
        folders[:] = [name for name in folders if (here / name).resolve() not in above]
        found += [here / name for name in names]
    for path in found:
        if not path.is_file():
            raise UserError(f"{path}: expected a file, found a link to nothing. Delete or fix it.")
    return sorted(found)


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, keyed by its path relative to it."""
    files = files_below(folder)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
