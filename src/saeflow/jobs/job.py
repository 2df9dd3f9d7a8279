"""A job: what it reads, its parameters and the code it runs, from which all the rest follows.

- Its key digests them. Snakemake runs a job again when its key changed.
- Its inputs, as Snakemake sees them, are the records of what it reads.
- Its task is what its command is told: the same results and parameters, and nothing else of the parameter file.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.config import ROOT
from saeflow.files import json_digest
from saeflow.jobs.code import Code, Reached
from saeflow.local_files import content_digests
from saeflow.provenance import FORMAT, RECORD

RESULTS = "results"
LONGEST = 100_000
"""Bytes of one argument of a command."""
LOCK = ROOT / "requirements.lock"
DISTRIBUTIONS = {
    "PIL": "pillow", "sklearn": "scikit-learn", "skdim": "scikit-dimension", "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub", "sae_lens": "sae-lens",
}  # fmt: skip
"""Names under which libraries are installed, if they are imported under others."""
BEHIND = {
    "transformers": ("tokenizers", "safetensors"), "zarr": ("numcodecs",), "pandas": ("numpy",), "torch": ("numpy",),
}  # fmt: skip
"""Libraries that do the work of others."""
ONLY_SHOWN = ("typer", "tqdm", "wandb", "rich")
"""Libraries that change no result."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One result and how it comes about.

    Attributes:
        command: the command of `saeflow` that makes it.
        result: its folder (or file), below results/.
        params: everything of the parameter file that its command is told.
        reads: the results that it reads, each under a name of its role there.
        helps: results that only save it work, such as a model that was fetched for another source: they come before
            and are in no key.
        code: what it runs, as entries of `Code.reached`; its command comes by itself.
        choices: which entries it uses of tables, as for `Code.reached`.
        files: files of the user's own that it reads besides those that its parameters name.
        package: where its code is found.
    """

    command: str
    result: str
    params: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, "Job | Sequence[Job]"] = field(default_factory=dict)
    helps: Mapping[str, "Job"] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()
    package: Code = field(repr=False)

    @property
    def path(self) -> Path:
        """Path of the result."""
        return Path(RESULTS, self.result)

    @property
    def record(self) -> str:
        """The file that stands for the whole result: its record."""
        return f"{self.path}.{RECORD}" if self.path.suffix == ".html" else f"{self.path}/{RECORD}"

    @property
    def is_made(self) -> bool:
        """Tell whether a result of this key is there, by its record alone."""
        try:
            record = json.loads(Path(self.record).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("key") == self.key

    @property
    def before(self) -> list["Job"]:
        """The jobs whose results it reads."""
        every = [one for value in self.reads.values() for one in _listed(value)]
        return [*every, *self.helps.values()]

    @property
    def inputs(self) -> list[str]:
        """Records of the results that it reads."""
        return list(dict.fromkeys(one.record for one in self.before))

    @property
    def entries(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Entry points of its code, and the entries of tables that it uses: the arguments of `Code.reached`."""
        table = "cli:JOBS"
        return [table, *self.code], [(table, self.command), *self.choices]

    @property
    def reached(self) -> Reached:
        """The code that it runs."""
        return self.package.reached(*self.entries)

    @functools.cached_property
    def key(self) -> str:
        """Digest everything that the result depends on."""
        parts = [
            FORMAT,
            self.command,
            self.params,
            self.reached.digest,
            pins(self.reached.libraries),
            {role: _of_each(value, lambda one: one.key) for role, value in self.reads.items()},
            content_digests({"files": self.files, "params": self.params}),
        ]
        return json_digest(parts)[:20]

    def task(self) -> dict[str, Any]:
        """Write down what the command is told."""
        reads = {**self.reads, **self.helps}
        return {
            "out": str(self.path),
            "key": self.key,
            "params": self.params,
            "reads": {
                role: _of_each(value, lambda one: str(one.path)) for role, value in reads.items()
            },
        }


def tasks(jobs: Iterable[Job]) -> str:
    """Write the tasks of some jobs of one command as JSON; what all of them have alike stands there once."""
    each = [job.task() for job in jobs]
    shared: dict[str, Any] = {}
    for part in ("params", "reads"):
        first = each[0][part]
        shared[part] = {
            k: v for k, v in first.items() if all(one[part].get(k) == v for one in each)
        }
        for one in each:
            one[part] = {k: v for k, v in one[part].items() if k not in shared[part]}
    return json.dumps({"shared": shared, "jobs": each}, sort_keys=True)


def arguments(text: str) -> str | list[str]:
    """Cut the tasks of a command into arguments that Linux takes: each is below 128 KiB (`execve(2)`).

    No argument begins like an option. What is short enough stays one text, as Snakemake has recorded it.
    """
    found = []
    while len(text) > LONGEST:
        end = LONGEST
        while text[end] == "-":
            end -= 1
        found.append(text[:end])
        text = text[end:]
    return [*found, text] if found else text


def pins(libraries: Iterable[str]) -> dict[str, str]:
    """Find the pinned versions of libraries, and of those that do their work.

    Args:
        libraries: by the name under which they are imported; those of Python itself have no pin.
    """
    names = {DISTRIBUTIONS.get(name, name) for name in libraries if name not in ONLY_SHOWN}
    names |= {behind for name in names for behind in BEHIND.get(name, ())}
    lock = _lock()
    return {name: lock[name] for name in sorted(names & lock.keys())}


@functools.cache
def _lock() -> dict[str, str]:
    text = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE))


def _listed(value: Job | Sequence[Job]) -> Sequence[Job]:
    return [value] if isinstance(value, Job) else value


def _of_each(value: Job | Sequence[Job], of: Callable[[Job], str]) -> str | list[str]:
    return of(value) if isinstance(value, Job) else [of(one) for one in value]
