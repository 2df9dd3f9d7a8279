"""Change inputs at random, and read them: the result, a refusal in one line, or an error."""

import copy
import json
import logging
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeflow.errors import UserError

MOST_BYTES = 2 << 30
"""Memory that reading one input may take."""
REFUSED = object()
"""Result of `read` for an input that was refused in one line."""

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "x", "\x00",
    "null", "../../etc/passwd", "ö🙂", "\ud800", "a\nb", "x" * 5000, [], {}, [[]], [{}], [None], {"a": {"b": [1]}},
    [1, 2, 3], {"role": "user", "content": "hi"}, "topk", "relu", "float16", 7, 4, "none",
]  # fmt: skip
SPECIAL_TEXT = ["", " ", "\n", "ordinary text", "ö🙂 ẞ", "tab\there", "a\u2028b\u2029c\x85d", "x" * 3000, "\ufeffstart", "\ufffd"]  # fmt: skip


class WrongError(AssertionError):
    """An input that gave a traceback, a wrong result, or a message that names no file."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the address space grow by MOST_BYTES at most."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read(work: Callable[[], Any], named: Path, row: str | None = None) -> Any:
    """The result of `work`, or REFUSED where it was refused in one line that names the file (and the row)."""
    try:
        with bounded_memory():
            return work()
    except UserError as error:
        said = str(error)
        if str(named) not in said and named.name not in said:
            raise WrongError(f"the message names no {named.name}: {said[:300]}") from None
        if row is not None and not re.search(row, said):
            raise WrongError(f"the message names no {row}: {said[:300]}") from None
        if len(said) > 2000:
            raise WrongError(f"a message of {len(said)} characters: {said[:200]}") from None
        return REFUSED
    except BaseException as error:
        raise WrongError(f"{type(error).__name__}: {str(error)[:300]}") from error


def demand(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongError(what)


def rotten(rng: random.Random, whole: bytes, *, first: int | None = None) -> bytes:
    """Bytes flipped, cut off, doubled, replaced or put in; near the start where `first` bounds it."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = rng.randrange(min(len(data), first or len(data)))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + rng.randint(1, 50)]
            case 3:
                data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])  # fmt: skip
            case 4:
                data[place:place] = rng.randbytes(rng.randint(1, 9))
            case _:
                data[place : place + 1] = rng.choice(
                    [b"{", b"}", b'"', b",", b"9", b"-", b"\n", b"e"]
                )
    return bytes(data)


def nasty(rng: random.Random) -> Any:
    """A value of its own, which later changes may reach into."""
    return copy.deepcopy(rng.choice(NASTY))


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: Any = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = list(enumerate(node))[:40]
    return [at, *(path for key, child in children for path in places(child, (*at, key)))]


def other_json(rng: random.Random, value: Any, changes: int | None = None) -> Any:
    """A JSON value with some places replaced, deleted or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3) if changes is None else changes):
        everywhere = places(value)[1:]
        if not everywhere:
            break
        *parents, last = rng.choice(everywhere)
        node = value
        for key in parents:
            node = node[key]
        match rng.randrange(4):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[rng.choice(["x", "", *node])] = nasty(rng)
            case _:
                node[last] = nasty(rng)
    return value


def write_json_or_rot(rng: random.Random, path: Path, value: Any) -> Any:
    """Write a changed JSON value; sometimes damaged bytes, and then None comes back."""
    if rng.random() < 0.25:
        path.write_bytes(rotten(rng, json.dumps(value, indent=1).encode()))
        return None
    changed = other_json(rng, value)
    path.write_text(json.dumps(changed), encoding="utf-8")
    return changed


@contextmanager
def said() -> Iterator[list[str]]:
    """Lines that saeflow logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("saeflow")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
