"""Progress of long work: a bar in a terminal, a plain line every 30 s in a log."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_EVERY_S = 30.0

logger = logging.getLogger(__name__)


def progress(items: Sequence[T], label: str, unit: str) -> Iterator[T]:
    """Give the items one by one and show how far the work is.

    Args:
        items: a sequence of known length.
        label: what is being done.
        unit: what one item is, in the singular.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, unit=unit, leave=False)
        return
    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= LOG_EVERY_S:
            said = now
            left = (now - began) / done * (len(items) - done) if done else float("nan")
            logger.info("%s: %d of %d %ss, %.0f s left", label, done, len(items), unit, left)
        yield item
    if (took := time.monotonic() - began) >= LOG_EVERY_S:
        logger.info("%s: %d %ss in %.0f s", label, len(items), unit, took)
