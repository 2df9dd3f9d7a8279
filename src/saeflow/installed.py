"""Versions of installed packages, and the programs that a run starts."""

import importlib.metadata
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PROGRAMS = "SAEFLOW_PROGRAMS"
"""The variable that names another folder than this interpreter's: that of saeflow.rehearsal.warm."""


def programs_folder() -> Path:
    """The folder whose `python` and `snakemake` are started."""
    return Path(os.environ.get(PROGRAMS, Path(sys.executable).parent))


def interpreter() -> str:
    """The Python that starts Snakemake: this one, which need not be called `python`, but for `SAEFLOW_PROGRAMS`."""
    return str(programs_folder() / "python") if PROGRAMS in os.environ else sys.executable


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
