"""Steps as CUDA graphs: the kernels of one step are recorded once and launched together from then on."""

import gc
import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from saeflow.batch import Batch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Capture = Callable[[Callable[[], Result]], tuple[Callable[[], object], Result]]
WARM = 3
"""Steps of one key before it is recorded: kernels are compiled, and a schedule that still moves shows."""


class Replayed(Generic[Result]):
    """A function of a batch that is recorded while nothing that decides its kernels changes.

    Args:
        function: reads nothing on the host, and changes only tensors that stay where they are. It is the
            reference: a recording does the same in the same memory, and its result lies in the same
            tensors after every call.
        capture: runs a function for what it would launch, and gives how to launch it, and its result,
            which holds values from the first launch on.
    """

    def __init__(self, function: Callable[[Batch], Result], capture: Capture[Result]) -> None:
        self.function, self.capture = function, capture
        self.is_possible = True
        self.forget(None)

    def forget(self, key: Hashable) -> None:
        """Drop the recording, and with it its memory; calls of another key follow."""
        self.key, self.calls = key, 0
        self.recorded: tuple[Batch, Callable[[], object], Result] | None = None

    def __call__(self, batch: Batch, key: Hashable) -> Result:
        """The function of a batch.

        Args:
            key: all that decides which kernels run, and with which numbers of the host.
        """
        key = (*((tuple(rows.shape), rows.dtype) for rows in batch.tensors()), key)
        if key != self.key:
            self.forget(key)
        self.calls += 1
        if self.recorded is None and self.is_possible and self.calls > WARM:
            self.record(batch)
        if self.recorded is None:
            return self.function(batch)
        held, replay, result = self.recorded
        for own, rows in zip(held.tensors(), batch.tensors(), strict=True):
            own.copy_(rows)
        replay()
        return result

    def record(self, batch: Batch) -> None:
        held = batch.map(torch.clone)
        try:
            replay, result = self.capture(lambda: self.function(held))
        except RuntimeError as error:  # of CUDA: the step is right without a recording, only slower
            self.is_possible = False
            logger.warning(
                "the step cannot be recorded as a CUDA graph and runs kernel by kernel: %s", error
            )
            return
        self.recorded = held, replay, result


def capture_cuda(function: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
    """Record what a function launches on the current GPU; other threads may go on copying meanwhile.

    No garbage is collected meanwhile: a graph of an earlier run that is freed during a recording spoils it.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
    finally:
        if was_on:
            gc.enable()
    return graph.replay, result
