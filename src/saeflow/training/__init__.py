"""Training: one trainer for every variant, with checkpoints."""

from saeflow.training.guided import with_found_k, with_k
from saeflow.training.trainer import train, train_group, train_part

__all__ = ["train", "train_group", "train_part", "with_found_k", "with_k"]
