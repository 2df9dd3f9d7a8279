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
"""Both libraries whose SAEs are traded, in one environment."""
BROKEN = {"dictionary_learning": ["torchvision"], EXCHANGE: ["torchvision"]}
"""Packages that a library's dependencies bring along, of another torch, and that it does not use."""


def environment(name: str) -> Path:
    """The interpreter of the environment of one of LIBRARIES, or of EXCHANGE."""
    libraries = ("SAELens", "dictionary_learning") if name == EXCHANGE else (name,)
    packages = " ".join(LIBRARIES[library] for library in libraries)
    folder = HERE / f".venv-{name}"
    python, ready = folder / "bin" / "python", folder / "ready"
    torch = importlib.metadata.version("torch").split("+")[0]
    wanted = f"torch=={torch} {packages}"
    # Several processes may ask at once (pytest's workers do); the first installs, the others wait for it.
    with FileLock(f"{folder}.lock"):
        if ready.exists() and ready.read_text() == wanted:
            return python
        sys.stderr.write(f"installing {packages}\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([*pip, "install", "--progress-bar", "off", *wanted.split()], check=True)
        for package in BROKEN.get(name, ()):
            subprocess.run([*pip, "uninstall", "-y", package], check=True)
        ready.write_text(wanted)
    return python
