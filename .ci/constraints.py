"""Constraints for pip: `newest` or `oldest` that pyproject.toml allows.

torch is the lock's in both, since every other build of it is gigabytes: its bounds are not tried.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def constraints(which: str) -> Iterator[str]:
    """Lines of a constraints file: the lock's torch, and of `oldest` every other dependency at its lower bound."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    yield from re.findall(r"^torch==[0-9.]+", lock, re.MULTILINE)
    if which == "newest":
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in project["dependencies"]:
        name, bound = re.split(r"[>=]=", wanted)  # a dependency without a lower bound is a mistake
        if name != "torch":
            yield f"{name}=={bound}"


if __name__ == "__main__":
    (chosen,) = sys.argv[1:]
    sys.stdout.writelines(f"{line}\n" for line in constraints(chosen))
