"""Copies between host and device that run beside the model: page-locked memory, a stream of their own.

On a CPU the same calls copy at once, so a source states one order of events for both.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Copies:
    """Copies to a device and back, in the order in which they are asked for.

    Args:
        device: where the model's inputs go.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def is_locked(self) -> bool:
        """Tell whether host memory is page-locked: on a GPU, whose copies then wait for nobody."""
        return self.device.type == "cuda"

    def to_device(self, x: Tensor) -> Tensor:
        """Send a CPU tensor to the device; the host does not wait."""
        if not self.is_locked:
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory that `to_host` writes to."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_locked)

    def to_host(self, x: Tensor, out: Tensor) -> None:
        """Copy x into `out`, of the same shape, once it is computed; whole after `when_done`'s call."""
        if x.device.type != "cuda":
            out.copy_(x)
            return
        stream = self._streams.setdefault(x.device, torch.cuda.Stream(x.device))
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            out.copy_(x, non_blocking=True)
        x.record_stream(stream)

    def when_done(self) -> Callable[[], None]:
        """Return a call that waits for all copies to the host asked for until now."""
        events = [stream.record_event() for stream in self._streams.values()]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait
