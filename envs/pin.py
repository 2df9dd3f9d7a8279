"""Pin the environments' packages, and all that these need, at the versions of requirements.lock.

    python envs/pin.py

Run it in the project's environment after changing the lock. Each envs/*.yaml lists what a step imports, above a
line that says where the rest begins.
"""

import importlib.metadata
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
REST = "      # What these need:"
LOCK = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (FOLDER.parent / "requirements.lock").read_text(), re.MULTILINE
    )
}


def needed(names: set[str]) -> set[str]:
    """Packages with all that they need, by the metadata of those installed here.

    What the lock leaves out, the CUDA libraries of some builds of torch, is left to pip here as well.
    """
    found: set[str] = set()
    open_ = [Requirement(name) for name in names]
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if name not in LOCK or (name in found and not requirement.extras):
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                open_.append(inner)
    return found


def pinned(text: str) -> str:
    """An environment's file with its versions and its rest as they should be."""
    head = text.split(REST)[0].rstrip()
    *_, pip = yaml.safe_load(head)["dependencies"]
    direct = {pin.split("==")[0] for pin in pip["pip"]}
    lines = [re.sub(r"- ([\w.-]+)==.*", lambda m: f"- {m[1]}=={LOCK[m[1]]}", head), REST]
    lines += [f"      - {name}=={LOCK[name]}" for name in sorted(needed(direct) - direct)]
    return "\n".join(lines) + "\n"


def main() -> None:
    for path in FOLDER.glob("*.yaml"):
        path.write_text(pinned(path.read_text()))


if __name__ == "__main__":
    main()
