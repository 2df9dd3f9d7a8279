"""Every result names what it was made from, and the chain can be checked.

A job makes one folder (or one file). It is written aside as `FOLDER.partial` and renamed when whole,
with a `provenance.json` inside (`FILE.provenance.json` beside a single file) that holds the digests of
its files, the digests of the results it read, the parameters it saw, code, lock, seed, device, versions
and times. A killed job leaves its partial folder; the same job started again finds it and goes on.
"""

import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import CARRIED, ROOT
from saeflow.device import label
from saeflow.errors import UserError
from saeflow.files import (
    canonical_json,
    file_digest,
    folder_digests,
    json_digest,
    read_json,
    replace_folder,
    write_json,
)
from saeflow.installed import versions_of

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
FORMAT = 1
RECORD = "provenance.json"
VERSIONED = (
    "torch", "transformers", "tokenizers", "datasets", "numpy", "scipy", "pandas", "zarr",
    "numcodecs", "safetensors", "matplotlib",
)  # fmt: skip
PARTIAL, READY, STREAM = ".partial", ".ready", ".stream"
_NO_TIME = {"duration_s": 0.0, "job_duration_s": 0.0}
_UNFINISHED = (PARTIAL, READY, STREAM, ".parts", ".windows", ".groups")
_JOB_FILE = "job.json"


@dataclass
class Job:
    """A running job: write into `path`; what is there when the job ends is the result."""

    path: Path
    resumed: bool
    details: dict[str, Any] = field(default_factory=dict)
    """Extra facts for the record, such as the content digest of a store."""
    share: float = 1.0
    """Share of the time, if one process makes several results at once."""
    before_s: float = 0.0
    """Seconds that earlier jobs spent on the result."""


def record_path(result: Path) -> Path:
    """Return the path of the record of a result folder or of a single result file."""
    if result.is_dir():
        return result / RECORD
    beside = result.with_name(result.name + "." + RECORD)
    if beside.exists():
        return beside
    for parent in result.parents:
        if (parent / RECORD).exists():
            return parent / RECORD
    return beside


def read_record(result: Path) -> dict[str, Any]:
    """The provenance record of a result.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = record_path(result)
    record = read_json(path)
    body = {key: value for key, value in record.items() if key != "record_digest"}
    if record.get("format") != FORMAT or record.get("record_digest") != json_digest(body):
        raise UserError(
            f"{path}: expected a provenance record (format {FORMAT}) that matches its own digest, "
            "found an edited or damaged one. Delete the result and rerun its step."
        )
    return dict(record)


def check(result: Path) -> str:
    """Verify every file of a result against its record and return the result's digest.

    Raises:
        UserError: a file is missing, damaged or not the one that the record names.
    """
    record = read_record(result)
    root = record_path(result).parent
    for name, expected in record["outputs"].items():
        path = root / name
        if not path.is_file():
            raise UserError(f"{path}: the file is missing. Delete {result} and rerun its step.")
        if file_digest(path) != expected:
            raise UserError(
                f"{path}: its bytes changed since it was made (SHA-256 differs from the one in "
                f"{record_path(result)}). Delete {result} and rerun its step."
            )
    return str(record["digest"])


def is_whole(result: Path) -> bool:
    """Tell whether a result folder has its record and every file that it names; their bytes are not read."""
    try:
        outputs = json.loads((result / RECORD).read_text(encoding="utf-8"))["outputs"]
    except (FileNotFoundError, ValueError):
        return False
    return all((result / name).is_file() for name in outputs)


def results_under(root: Path) -> list[Path]:
    """Every whole result in a folder that is not a part of one; what jobs are still writing is left out.

    Raises:
        UserError: a file belongs to no result, since its record is missing.
    """
    found: list[Path] = []
    if any((parent / RECORD).exists() for parent in root.resolve().parents):
        return found
    for folder, folders, files in os.walk(root):
        place = Path(folder)
        if RECORD in files:
            found.append(place)
            folders.clear()
            continue
        folders[:] = sorted(n for n in folders if n[0] != "." and not n.endswith(_UNFINISHED))
        singles = {name.removesuffix(f".{RECORD}") for name in files if name.endswith(f".{RECORD}")}
        found += [place / name for name in sorted(singles)]
        known = {*singles, *(f"{name}.{RECORD}" for name in singles)}
        if stray := [name for name in sorted(files) if name not in known and name[0] != "."]:
            raise UserError(
                f"{place / stray[0]}: expected {RECORD} beside it, which says what made it, found none. "
                f"Delete {place} and rerun its step."
            )
    return found


def ready_of(result: Path) -> Path:
    """Return the folder in which a group's job leaves a result until the result's own job takes it (see `saeflow.jobs.groups`)."""
    return result.with_name(result.name + READY)


def is_current(place: Path, key: str) -> bool:
    """Tell whether a result is whole, of this key, and made from the inputs that are there now."""
    try:
        record = read_record(place)
        if not key or record.get("key") != key:
            return False
        check(place)
        return all(read_record(Path(path))["digest"] == d for path, d in record["inputs"].items())
    except UserError:
        return False


def take_ready(result: Path, key: str) -> bool:
    """Move a result that its group's job left ready to its place; one that is out of date is deleted."""
    ready = ready_of(result)
    is_taken = is_current(ready, key)
    if is_taken:
        replace_folder(ready, result)
    if is_taken:
        shutil.rmtree(partial_of(result), ignore_errors=True)
    shutil.rmtree(ready, ignore_errors=True)
    return is_taken


def take_unfinished(result: Path) -> None:
    """Let a job go on from what a killed job of a group left of its result; only where no group's job may still run."""
    of_group, own = partial_of(ready_of(result)), partial_of(result)
    if of_group.exists() and not own.exists():
        of_group.replace(own)
    shutil.rmtree(of_group, ignore_errors=True)


def partial_of(result: Path) -> Path:
    """Return the folder in which a job writes a result until it is whole."""
    return result.with_name(result.name + PARTIAL)


def stream_of(result: Path) -> Path:
    """Return the folder in which training leaves an SAE's state between two windows of a stream."""
    return result.with_name(result.name + STREAM)


@contextmanager
def job(
    result: Path,
    *,
    name: str,
    inputs: Iterable[Path] = (),
    external: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    key: str = "",
    seed: int | None = None,
    device: str = "cpu",
    resumable: bool = False,
    checked: bool = True,
) -> Iterator[Job]:
    """Make one result folder whole or not at all, with its record.

    Args:
        result: the folder to make.
        name: the command, such as "train".
        inputs: result folders this job reads; each is verified before the job starts.
        external: digests of what comes from outside (files, hub revisions), by name.
        params: the parameters the job saw.
        key: the workflow's digest of what the job depends on.
        seed, device: recorded.
        resumable: keep the partial folder when the job fails, and go on from it when the same job
            (same name, parameters, inputs) is started again.
        checked: verify the inputs' files; False only where the job itself reads and verifies them.
    """
    started = time.time()
    digests = {
        str(path): check(path) if checked else str(read_record(path)["digest"]) for path in inputs
    }
    identity = {
        "name": name, "params": params or {}, "inputs": digests, "external": dict(external or {}),
        "seed": seed, "code": code_digest(),
    }  # fmt: skip
    partial = partial_of(result)
    job_file = partial / _JOB_FILE
    same_job = identity | {"code": key or identity["code"]}  # a key digests the code that matters
    resumed = resumable and job_file.exists() and job_file.read_text() == canonical_json(same_job)
    if not resumed:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if resumable:
            write_json(job_file, same_job)
    running = Job(partial, resumed)
    try:
        yield running
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    job_file.unlink(missing_ok=True)
    outputs = folder_digests(partial)
    took = time.time() - started
    times = {
        "duration_s": round(took * running.share + running.before_s, 2),
        "job_duration_s": round(took + running.before_s, 2),
    }
    details = times | running.details
    _write_record(partial / RECORD, outputs, identity, key, device, started, details)
    replace_folder(partial, result)


def record_file(
    file: Path, *, name: str, inputs: Iterable[Path], params: Mapping[str, Any], key: str = ""
) -> None:
    """Write the record of one finished result file beside it."""
    identity = {
        "name": name, "params": dict(params), "external": {}, "seed": None, "code": code_digest(),
        "inputs": {str(path): check(path) for path in inputs},
    }  # fmt: skip
    record = file.with_name(file.name + "." + RECORD)
    _write_record(
        record, {file.name: file_digest(file)}, identity, key, "cpu", time.time(), _NO_TIME
    )


def _write_record(
    path: Path,
    outputs: dict[str, str],
    identity: dict[str, Any],
    key: str,
    device: str,
    started: float,
    details: dict[str, Any],
) -> None:
    began = datetime.datetime.fromtimestamp(started, datetime.UTC)
    body = {
        "format": FORMAT,
        "job": identity["name"],
        "outputs": outputs,
        "digest": json_digest(outputs),
        "inputs": identity["inputs"],
        "external": identity["external"],
        "params": identity["params"],
        "key": key,
        "seed": identity["seed"],
        "code": {"digest": identity["code"], **_git_state()},
        "lock": _lock_digest(),
        "device": label(device),
        "versions": _versions(),
        "started": began.isoformat(timespec="seconds"),
        **details,
    }
    write_json(path, body | {"record_digest": json_digest(body)})


@functools.cache
def code_digest() -> str:
    """SHA-256 of the package's source files as they are, comments included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_relative_to(PACKAGE / CARRIED):
            continue
        if path.suffix in (".py", ".j2", ".yaml"):
            digest.update(path.relative_to(PACKAGE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _git_state() -> dict[str, Any]:
    """The commit the code came from and whether the tree differs from it.

    None where the code is in no git checkout, or is not one of its files. Where git cannot say, a warning does.
    """
    unknown = {"commit": None, "dirty": None}
    if not any((parent / ".git").exists() for parent in PACKAGE.parents):
        return unknown
    try:
        if not _git("ls-files", "--", str(PACKAGE / "errors.py")):
            return unknown  # a copy inside another project's checkout
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/.snakemake")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _warn_once(
            f"records name no commit of {PACKAGE}: git cannot tell it ({said.strip().splitlines()[0]})"
        )
        return unknown
    return {"commit": commit, "dirty": bool(status)}


def _git(*command: str) -> str:
    """Run git on the package's checkout, whoever owns it and whichever repository called this program.

    Raises:
        OSError: there is no git.
        subprocess.CalledProcessError: git refuses.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(PACKAGE), "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *command],
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _lock_digest() -> str | None:
    lock = ROOT / "requirements.lock"
    return file_digest(lock) if lock.exists() else None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions_of(VERSIONED)}
