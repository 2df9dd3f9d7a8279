"""Steps whose latents had more entries than there was room for on a GPU: they change nothing, and are taken again.

The host sizes lists before a step and does not wait for it. So a step that lacked room is found on the device, which
applies neither its update nor that of any later step; the host reads this some steps later, makes room, and takes the
steps again, in their order. No update ever comes from latents that were cut off.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.operators.gpu.record import keep_first

Taken = TypeVar("Taken")
AHEAD = 8
"""Steps that the host may be ahead of what it has read: enough that a GPU never waits for it."""


class Lacking(NamedTuple):
    """The first step that lacked room."""

    rows: int  # with more latents than there was room for
    dead: int  # latents that are dead, where they are more than there was room for; else 0


class _Sent(NamedTuple):
    """A step whose outcome the host has not read yet."""

    step: int
    batch: Batch
    arrived: torch.cuda.Event | None


class Room:
    """Device-side record of the first step that lacked room, and all that is needed to take it again.

    Args:
        state: what steps change beside weights and moments, which `look` guards.
    """

    def __init__(self, state: list[Tensor]) -> None:
        device = state[0].device
        self.state = state
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.lacking = torch.zeros(2, dtype=torch.int64, device=device)
        self.before: list[list[Tensor]] = [
            [] for _ in range(AHEAD)
        ]  # states, of step n at n % AHEAD
        self.sent: deque[_Sent] = deque()
        self.read = torch.full((AHEAD,), -1, dtype=torch.int64, pin_memory=device.type == "cuda")

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Keep the state before a step, schedules included."""
        kept = self.before[step % AHEAD]
        if kept:
            torch._foreach_copy_(kept, self.state)
        else:
            kept += [tensor.clone() for tensor in self.state]

    def look(self, step: Tensor, lacking: Tensor) -> Tensor:
        """Return whether this step, or one before it, must be taken again.

        Args:
            step: () int64, its number.
            lacking: (2,) int64, see `Lacking`; zeros where there was room.

        Returns:
            () bool, on the device.
        """
        return keep_first(lacking, step, self.lacking, self.step)

    def send(self, step: int, batch: Batch) -> None:
        """Send for the outcome of a step, of a batch that is kept until it is known."""
        self.read[step % AHEAD].copy_(self.step, non_blocking=True)
        arrived = None
        if self.step.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.sent.append(_Sent(step, batch, arrived))

    def late(self, *, is_all: bool) -> list[tuple[int, Batch]]:
        """Read what was sent `AHEAD` steps ago, or all that was sent: numbers and batches of steps to take again.

        All processes of a run read alike, since nothing depends on what has arrived when.
        """
        outcomes = self.read.numpy()  # no operation of torch's: there is nothing to wait for
        while self.sent and (is_all or len(self.sent) == AHEAD):
            if (arrived := self.sent[0].arrived) is not None:
                arrived.synchronize()
            if outcomes[self.sent[0].step % AHEAD] >= 0:
                late = [(sent.step, sent.batch) for sent in self.sent]
                self.sent.clear()
                return late
            self.sent.popleft()
        return []

    def catch_up(
        self,
        take: Callable[[int, Batch], Taken],
        make_room: Callable[[int, Lacking], None],
        *,
        is_all: bool,
    ) -> Taken | None:
        """Take steps again from the first that lacked room, if one of those that are read now did.

        Args:
            take: takes the step of a number, of its batch.
            make_room: makes what a step lacked.
            is_all: wait for all that were sent.

        Returns:
            The last step; None where none was taken again.
        """
        taken = None
        late = self.late(is_all=is_all)
        lacking = self.undo() if late else None
        for number, batch in late:
            while True:
                if lacking is not None:
                    make_room(number, lacking)
                taken = take(number, batch)
                if (lacking := self.undo()) is None:
                    break
        return taken

    @torch.no_grad()
    def undo(self) -> Lacking | None:
        """Put back the state before the first step that lacked room; None where none did. Waits for the device."""
        step = int(self.step)
        if step < 0:
            return None
        torch._foreach_copy_(self.state, self.before[step % AHEAD])
        self.step.fill_(-1)
        return Lacking(*self.lacking.tolist())
