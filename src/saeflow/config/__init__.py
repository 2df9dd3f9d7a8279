"""`params.yaml`: read, refuse what is wrong before any job, expand sweeps into runs.

This package imports no model code: Snakefile and command line read it in a fraction of a second.
"""

from saeflow.config.check import SCORER, check_params, load_params, scorer_file, validate
from saeflow.config.runs import (
    IMPORTED,
    SPLITS,
    ImportConfig,
    SAEConfig,
    TrainingConfig,
    expand_runs,
    imports,
)
from saeflow.config.schema import CARRIED, ROOT
from saeflow.config.sweep import share_of, trial_of, without_trial
from saeflow.config.windows import contexts_of, draw_of, n_windows, steps_of
from saeflow.config.yaml_file import read_yaml

__all__ = [
    "CARRIED",
    "IMPORTED",
    "ROOT",
    "SCORER",
    "SPLITS",
    "ImportConfig",
    "SAEConfig",
    "TrainingConfig",
    "check_params",
    "contexts_of",
    "draw_of",
    "expand_runs",
    "imports",
    "load_params",
    "n_windows",
    "read_yaml",
    "scorer_file",
    "share_of",
    "steps_of",
    "trial_of",
    "validate",
    "without_trial",
]
