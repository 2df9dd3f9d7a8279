"""Rehearsals: a parameter file's whole DAG on this machine in minutes, with small models and data in place of the real ones."""

from saeflow.rehearsal.run import RehearsalFailed, rehearse, stage
from saeflow.rehearsal.scale import MARK, Rehearsal, rehearsal_of

__all__ = ["MARK", "Rehearsal", "RehearsalFailed", "rehearsal_of", "rehearse", "stage"]
