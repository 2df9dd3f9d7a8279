"""Compiled CPU kernels, for what plain torch needs several passes over memory.

Each kernel has a plain torch form beside its caller, which is the fallback and the reference. Kernels
are compiled by numba at their first use and kept on disk; they release the interpreter's lock and are
spread over `torch.get_num_threads()` threads by rows, so results do not depend on that number.
"""

import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PIECES = 4  # per thread, so that a thread that is held up delays the others little
is_on = os.environ.get("SAEFLOW_NATIVE", "1") != "0"


def serves(*tensors: Tensor | None) -> bool:
    """Return whether the compiled kernels take these tensors: float32 on a CPU, with numba installed."""
    return (
        is_on
        and all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)
        and _module("selection") is not None
    )


@cache
def _module(name: str) -> ModuleType | None:
    """A module of kernels, imported at its first use; None without a numba that works."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
    except (ImportError, RuntimeError) as error:
        # A numba that does not fit numpy; or no place that can be written for compiled kernels: the package's folder
        # and the user's cache are both read-only (numba/core/caching.py).
        logger.warning(
            "compiled CPU kernels cannot be used, plain torch does their work, more slowly: %s. To keep them, set "
            "NUMBA_CACHE_DIR to a folder that can be written.", error
        )  # fmt: skip
    return None


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saeflow-kernel")


def call(kernel: str, *arguments: Any) -> Any:
    """module.kernel(*arguments), tensors as arrays on the same memory."""
    module, name = kernel.split(".")
    arrays = (a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments)
    return getattr(_module(module), name)(*arrays)


def spread(kernel: str, count: int, *arguments: Any) -> list[Any]:
    """module.kernel(*arguments, start, stop) over 0..count in pieces; what each returned, in order."""
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = torch.get_num_threads()
    if threads == 1 or count < 2 * threads:
        return [call(kernel, *arrays, 0, count)]
    pieces = min(count, PIECES * threads)
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    work = _pool(os.getpid(), threads)
    return list(work.map(lambda at: call(kernel, *arrays, *at), pairwise(ends)))
