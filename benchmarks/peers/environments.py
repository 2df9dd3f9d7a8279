"""Environments of other libraries, each made where it is not there yet."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
LIBRARIES = {
    "SAELens": "sae-lens==6.54.12",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sparsify": "eai-sparsify==1.3.3",
}
EXCHANGE = "exchange"
"""The libraries whose SAEs are traded, and those that take adapted ones, in one environment; saeflow's own code, which
builds the adapted ones there, needs jsonschema."""
_EXCHANGED = (
    LIBRARIES["SAELens"], LIBRARIES["dictionary_learning"], "sae-bench==0.6.0", "sae-probes==0.4.2",
    "neuronpedia==1.2.1", "jsonschema",
)  # fmt: skip
_ALONE = {EXCHANGE: ("sae-dashboard==0.8.0",)}
"""Packages without their dependencies, which contradict the others'; their formats need none."""
BROKEN = {"dictionary_learning": ["torchvision"], EXCHANGE: ["torchvision"]}
"""Packages that a library's dependencies bring along, of another torch, and that it does not use."""


def environment(name: str) -> Path:
    """The interpreter of the environment of one of LIBRARIES, or of EXCHANGE."""
    packages = " ".join(_EXCHANGED) if name == EXCHANGE else LIBRARIES[name]
    folder = HERE / f".venv-{name}"
    python, ready = folder / "bin" / "python", folder / "ready"
    torch = importlib.metadata.version("torch").split("+")[0]
    alone = _ALONE.get(name, ())
    wanted = f"torch=={torch} {packages}"
    # Several processes may ask at once (pytest's workers do); the first installs, the others wait for it.
    with FileLock(f"{folder}.lock"):
        whole = " ".join([wanted, *alone])
        if ready.exists() and ready.read_text() == whole:
            return python
        sys.stderr.write(f"installing {packages}\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([*pip, "install", "--progress-bar", "off", *wanted.split()], check=True)
        if alone:
            subprocess.run(
                [*pip, "install", "--progress-bar", "off", "--no-deps", *alone], check=True
            )
        for package in BROKEN.get(name, ()):
            subprocess.run([*pip, "uninstall", "-y", package], check=True)
        ready.write_text(whole)
    return python
