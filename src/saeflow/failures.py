"""Failures of a Snakemake run: the last line of each failed job's log."""

import re
from collections.abc import Iterable
from pathlib import Path

_FAILED = re.compile(
    r"^Error in rule (?P<rule>\w+):\n(?P<facts>(?:    .*\n|\n(?=    ))*)", re.MULTILINE
)
_JOB = re.compile(r"^    jobid: (?P<id>\d+)$", re.MULTILINE)
_LOG = re.compile(r"^    log: (?P<path>.+?)(?: \(check log file.*)?$", re.MULTILINE)


def failures(logs: Iterable[Path]) -> list[str]:
    """Lines for a terminal, one a failed job, each once; none of a job that a later try finished.

    Args:
        logs: what Snakemake wrote of the run.
    """
    found = {}
    text = "\n".join(log.read_text(encoding="utf-8", errors="backslashreplace") for log in logs)
    for failed in _FAILED.finditer(text):
        named = _LOG.search(failed["facts"])
        job = _JOB.search(failed["facts"])
        if named is None or (job and f"\nFinished jobid: {job['id']} (" in text[failed.end() :]):
            continue
        path = Path(named["path"].split(", ")[0])
        if said := _last_words(path):
            found[said] = f"{said} [{failed['rule']}; the whole log: {path}]"
    return list(found.values())


def _last_words(path: Path) -> str | None:
    """The last `error: ...` of a job's log. A job that wrote none was killed, or failed outside the package."""
    if not path.is_file():
        return None
    lines = [
        line.strip()
        for line in path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    ]
    if errors := [line for line in lines if line.startswith("error: ")]:
        return errors[-1]
    written = [line for line in lines if line]
    return (
        f"error: the job ended without a message. Its last line: {written[-1]}" if written else None
    )
