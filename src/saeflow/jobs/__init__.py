"""Jobs: what each reads, its parameters and its code, stated once; keys, inputs and tasks follow."""

from saeflow.jobs.code import Code
from saeflow.jobs.declared import Jobs
from saeflow.jobs.groups import Groups
from saeflow.jobs.job import Job, arguments, tasks
from saeflow.jobs.task import Task, read_task, read_tasks

__all__ = [
    "Code", "Groups", "Job", "Jobs", "Task", "arguments", "read_task", "read_tasks", "tasks",
]  # fmt: skip
