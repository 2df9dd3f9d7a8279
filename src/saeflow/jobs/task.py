"""A task: a job as its command is told of it, in JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import parse_json


@dataclass(frozen=True)
class Task:
    """One result to make.

    Attributes:
        out: where it is written.
        key: of its job, for its record.
        params: the parameters that it depends on.
        reads: folders of the results that it reads, by their role; several of one role in a list.
    """

    out: Path
    key: str
    params: dict[str, Any]
    reads: Mapping[str, Path | list[Path]]

    def one(self, role: str) -> Path:
        """The folder of a result that is read.

        Raises:
            UserError: there is none in this role, or a list.
        """
        found = self.reads.get(role)
        if not isinstance(found, Path):
            raise UserError(
                f"{self.out}: expected the folder of one result as reads.{role}, found {found!r}."
            )
        return found

    def optional(self, role: str) -> Path | None:
        """The folder of a result that is read, if there is one in this role."""
        return self.one(role) if role in self.reads else None

    def many(self, role: str) -> list[Path]:
        """The folders of results that are read.

        Raises:
            UserError: they are no list.
        """
        found = self.reads.get(role)
        if not isinstance(found, list):
            raise UserError(
                f"{self.out}: expected a list of folders as reads.{role}, found {found!r}."
            )
        return found

    @property
    def inputs(self) -> list[Path]:
        """The folders of all results that are read, each once."""
        lists = (value if isinstance(value, list) else [value] for value in self.reads.values())
        return list(dict.fromkeys(path for paths in lists for path in paths))


def read_tasks(told: Iterable[str]) -> list[Task]:
    """Read the tasks of a command from JSON, as `saeflow.jobs.tasks` writes them.

    Args:
        told: the text, whole or as the arguments that `saeflow.jobs.arguments` cuts it into.

    Raises:
        UserError: it is something else, or holds numbers that are not finite.
    """
    text = "".join(told)
    values = parse_json("the task", text)
    try:
        shared = values["shared"]
        return [
            Task(
                out=Path(one["out"]),
                key=one["key"],
                params=shared["params"] | one["params"],
                reads={k: _paths(v) for k, v in (shared["reads"] | one["reads"]).items()},
            )
            for one in values["jobs"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the task: expected {{shared: {{params, reads}}, jobs: [{{out, key, params, reads}}]}}, found {text[:60]!r} "
            f"({error!r}). `snakemake -n -p` prints what the workflow gives."
        ) from None


def read_task(told: Iterable[str]) -> Task:
    """Read the task of a command that makes one result.

    Raises:
        UserError: as `read_tasks`, or there are several.
    """
    found = read_tasks(told)
    if len(found) != 1:
        raise UserError(f"the task: expected one result, found {len(found)}.")
    return found[0]


def _paths(value: Any) -> Path | list[Path]:
    return [Path(one) for one in value] if isinstance(value, list) else Path(value)
