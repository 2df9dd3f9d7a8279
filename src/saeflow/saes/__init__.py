"""Sparse autoencoders: the table of variants, and saved ones."""

from saeflow.saes.base import SAE, Forward
from saeflow.saes.batch_topk import BatchTopK
from saeflow.saes.files import load, read_config, save
from saeflow.saes.relu import ReLU
from saeflow.saes.topk import TopK
from saeflow.saes.variants import VARIANTS, build

__all__ = [
    "SAE",
    "VARIANTS",
    "BatchTopK",
    "Forward",
    "ReLU",
    "TopK",
    "build",
    "load",
    "read_config",
    "save",
]
