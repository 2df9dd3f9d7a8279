"""Walk from a result down to models and data, and check every link of the chain."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.provenance import RECORD, check, read_record, record_path


@dataclass(frozen=True)
class Link:
    """One result in the chain of a traced file."""

    depth: int
    result: str
    job: str
    digest: str
    facts: str
    seen: bool


def result_of(file: Path) -> Path:
    """The result that a file belongs to: its folder with a record, or the file itself.

    Raises:
        UserError: the file does not exist, or no record names it.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file. Give a file or folder below results/.")
    path = record_path(file)
    if not path.exists():
        raise UserError(
            f"{file}: no provenance record names it. Give a result that a saeflow job made."
        )
    if path.name != RECORD:
        return file
    root = path.parent
    if file != root and file.is_file() and path != file:
        name = file.relative_to(root).as_posix()
        if name not in read_record(root)["outputs"]:
            raise UserError(f"{file}: {path} does not name it. Give a result that a job made.")
    return root


def rests_on(result: Path) -> set[Path]:
    """Every result that a result of a results folder was made from, with itself, by the records that are there."""
    home = result.parent.parent  # records name results from where jobs ran
    found: set[Path] = set()
    waiting = [result]
    while waiting:
        one = waiting.pop()
        if one not in found and record_path(one).exists():
            found.add(one)
            waiting += [home / path for path in read_record(one)["inputs"]]
    return found


def trace(
    file: Path, external_digest: Callable[[str], str | None], seen: set[str] | None = None
) -> Iterator[Link]:
    """Walk from a result down to models and data, checking every digest on the way.

    Args:
        file: a result file or folder.
        external_digest: the present digest of something from outside, by the name it was recorded
            under; None where it cannot be told any more (a hub revision, which is its own digest).
        seen: results that were walked down from already, in an earlier call too; added to.

    Raises:
        UserError: a link is broken; the message names the file.
    """
    seen = set() if seen is None else seen
    root = result_of(file)
    stack: list[tuple[int, Path, str | None, Path | None]] = [(0, root, None, None)]
    while stack:
        depth, result, expected, reader = stack.pop()
        if str(result) in seen:
            record = read_record(result)
            yield Link(depth, str(result), record["job"], record["digest"], "", True)
        else:
            seen.add(str(result))
            if not record_path(result).exists():
                raise UserError(
                    f"{record_path(result)}: the record is missing, but {reader} was made from it. "
                    "Rerun the step that makes it."
                )
            digest = check(result)
            record = read_record(result)
            for name, recorded in record["external"].items():
                now = external_digest(name)
                if now is not None and now != recorded:
                    raise UserError(
                        f"{name}: changed since {result} was made from it (SHA-256 was {recorded[:12]}, "
                        f"is {now[:12]}). Restore it, or rerun the workflow."
                    )
            yield Link(depth, str(result), record["job"], digest, _facts(record), False)
            stack.extend(
                (depth + 1, Path(path), recorded, result)
                for path, recorded in reversed(record["inputs"].items())
            )
        if expected is not None and record["digest"] != expected:
            raise UserError(
                f"{result}: not the one that {reader} was made from (digest {record['digest'][:12]}, "
                f"expected {expected[:12]}). Rerun the workflow, or restore the older result."
            )


def _facts(record: Mapping[str, Any]) -> str:
    commit = record["code"]["commit"]
    code = (
        f"commit {commit[:10]}{' + changes' if record['code']['dirty'] else ''}" if commit else ""
    )
    outside = [f"from {name} ({digest[:12]})" for name, digest in record["external"].items()]
    return ", ".join([f"{record['duration_s']:g} s", *filter(None, [code]), *outside])
