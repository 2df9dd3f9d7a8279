"""The time that each of several runs takes of a device that they share."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_MOST_MARKS = 64  # that are kept though the device is past them


class Clock:
    """Seconds of one run's work.

    On a CPU they are the host's. On a GPU, whose work the host does not wait for, they are the device's, and are
    known once it has done all that was timed.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self.marks: deque[tuple[torch.cuda.Event, torch.cuda.Event, float]] = deque()

    def add(self, seconds: float) -> None:
        """Count time of the host that was measured elsewhere."""
        self.seconds += seconds

    def waited(self, seconds: float) -> None:
        """Count time in which the host waited for a batch, unless a GPU had work all the while."""
        if not self.marks or self.marks[-1][1].query():
            self.add(seconds)

    def mark(self, begin: torch.cuda.Event, end: torch.cuda.Event, share: float) -> None:
        """Count a share of the time between two events, once the device has reached both."""
        self.marks.append((begin, end, share))
        while len(self.marks) > _MOST_MARKS and self.marks[0][1].query():
            self._take()

    def read(self) -> float:
        """Seconds so far; waits for the device where it has not done what was timed."""
        if self.marks:
            self.marks[-1][1].synchronize()
        while self.marks:
            self._take()
        return self.seconds

    def _take(self) -> None:
        begin, end, share = self.marks.popleft()
        self.seconds += share * begin.elapsed_time(end) / 1e3


@contextmanager
def running(clocks: Sequence[Clock]) -> Iterator[None]:
    """Count the time of what is done in this context, an equal share on each of the clocks of one device."""
    share = 1 / len(clocks)
    if clocks[0].device.type != "cuda":
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        for clock in clocks:
            clock.add(share * took)
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    yield
    end.record()
    for clock in clocks:
        clock.mark(begin, end, share)


def shares(clocks: Sequence[Clock]) -> list[float]:
    """The part of all time that each clock counted, together 1; alike where none counted any."""
    seconds = [clock.read() for clock in clocks]
    total = sum(seconds)
    return [each / total if total else 1 / len(seconds) for each in seconds]
