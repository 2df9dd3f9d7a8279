"""Sparse autoencoders: the table of variants, and saved ones."""

from saeflow.saes.base import SAE
from saeflow.saes.files import load, read_config, save
from saeflow.saes.forward import Forward
from saeflow.saes.input_scale import InputScale
from saeflow.saes.ranks import Ranks
from saeflow.saes.variants import VARIANTS, build

__all__ = [
    "SAE",
    "VARIANTS",
    "Forward",
    "InputScale",
    "Ranks",
    "build",
    "load",
    "read_config",
    "save",
]
