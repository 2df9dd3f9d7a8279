"""Where the programs lie that a run starts: Snakemake, and the `python` of its jobs."""

import os
import sys
from pathlib import Path

PROGRAMS = "SAEFLOW_PROGRAMS"
"""The variable that names another folder than this interpreter's: that of saeflow.rehearsal.warm."""


def programs_folder() -> Path:
    """The folder whose `python` and `snakemake` are started."""
    return Path(os.environ.get(PROGRAMS, Path(sys.executable).parent))
