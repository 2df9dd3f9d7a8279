"""Groups: one job that makes the results of several, such as SAEs that are trained in one pass over a store.

Every result keeps a job and a key of its own; how many are made together changes none of them. The job of a group comes
before the jobs of its results. It makes the results that are missing or out of date and leaves each beside its place, in
RESULT.ready. The job of a result then only moves it to its place. One that finds nothing ready makes its result itself.

Three facts about Snakemake make this work (workflow/rules/training.smk):
- GROUP.done, which stands for the group's job, is temporary: Snakemake makes such a file only where a job that reads it
  has a reason of its own to run.
- Only jobs whose result is missing or out of date, by its record, read it: it is no reason for the others to run.
- GROUP is a digest of the members' keys, so that a group that changed is another group and never out of date.
"""

from collections.abc import Iterable, Sequence

from saeflow.files import json_digest
from saeflow.jobs.job import Job


class Groups:
    """The groups of one step's jobs.

    Args:
        groups: the jobs of each; one of fewer jobs than `least` is no group.
    """

    def __init__(self, groups: Iterable[Sequence[Job]], least: int = 2) -> None:
        self.members: dict[str, list[Job]] = {}
        """The jobs of each group, by the group's name."""
        self._of: dict[str, str] = {}
        for jobs in groups:
            if len(jobs) >= least:
                name = json_digest([job.key for job in jobs])[:16]
                self.members[name] = list(jobs)
                self._of |= {job.result: name for job in jobs}

    def of(self, job: Job) -> str | None:
        """The name of the group that a job is in, if it is in one."""
        return self._of.get(job.result)
