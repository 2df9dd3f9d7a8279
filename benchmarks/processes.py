"""Independent pieces of work in as many processes as asked for, each result as it comes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Give each task with its result when it ends; tasks begin in their order.

    A failure, Ctrl-C and a closed iterator stop what has not begun. No process outlives this one.

    Args:
        work: a function of a module, which the processes import.
        tasks: what can be pickled.
        workers: processes.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)
    try:
        running = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def time_left(done: int, total: int, seconds: float) -> str:
    """Return how many of how many are done, and the minutes that the rest takes at this pace."""
    return f"{done} of {total}, {seconds / done * (total - done) / 60:.0f} min left"


def _begin() -> None:
    """End this process at Ctrl-C without a word, and when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
