"""The job that trains SAEs."""

import os
from contextlib import ExitStack
from typing import Any

from saeflow import jobs, provenance
from saeflow.cli.arguments import Ahead, RuntimeJson, Tasks, Threads, is_made, machine_of, placed
from saeflow.config import SAEConfig
from saeflow.errors import UserError


def train(tasks: Tasks, runtime: RuntimeJson, threads: Threads, ahead: Ahead = False) -> None:
    """Train SAEs on one store, one or several in one pass over its batches."""
    asked = jobs.read_tasks(tasks)
    configs = [SAEConfig.from_dict(task.params["run"]) for task in asked]
    if len({(config.source, config.hook_point) for config in configs}) > 1:
        raise UserError("TASKS: expected runs of one store, found several. Train them one by one.")
    is_first = os.environ.get("RANK", "0") == "0"
    is_there = [is_first and is_made(task, ahead=ahead) for task in asked]
    if all(is_there) and os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without waiting for torch: most jobs only take what their group has trained
    from saeflow.saes import Ranks
    from saeflow.stores import open_store
    from saeflow.training import train_group

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun
    machine = machine_of(runtime, max(1, threads // here))
    machine["logging"] = {"folder": "logs", **machine.get("logging", {})}
    ranks = Ranks.from_environment(machine["ranks"]["split"], machine["device"])
    wanted = [
        (placed(task, ahead=ahead), config)
        for task, config, there in zip(asked, configs, is_there, strict=True)
        if not ranks.agree(int(there), False)[0]
    ]
    if not wanted:
        return
    if is_first and machine.get("saes_per_job") == 1:  # there are no groups, or none any more
        for task, _ in wanted:
            provenance.take_unfinished(task.out)
    reader = open_store(asked[0].one("train") / f"{configs[0].hook_point}.zarr")
    with ExitStack() as stack:
        making: list[provenance.Job] = []
        for task, config in wanted if is_first else ():
            job = provenance.job(
                task.out,
                name="train",
                inputs=task.inputs,
                params=task.params,
                key=task.key,
                seed=config.seed,
                device=machine["device"],
                resumable=True,
                checked=not making,  # one check serves all
            )
            making.append(stack.enter_context(job))
        ranks.wait()  # for the folders
        trained = [
            (_with_k(config, task, reader), provenance.partial_of(task.out), task.optional("probe"))
            for task, config in wanted
        ]
        found = train_group(reader, trained, machine, ranks)
        for made, one in zip(making, found, strict=False):
            made.details["content"], made.share = one.content, one.share


def _with_k(config: SAEConfig, task: jobs.Task, store: Any) -> SAEConfig:
    """Put the k that a run's guide found into its configuration, where it has a guide."""
    guide = task.optional("guide")
    if guide is None:
        return config
    from saeflow.saes import load
    from saeflow.training import with_found_k

    provenance.check(guide)
    return with_found_k(config, load(guide), store)
