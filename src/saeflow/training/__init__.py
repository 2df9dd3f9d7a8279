"""Training: one trainer for every variant, with checkpoints."""

from saeflow.training.trainer import train

__all__ = ["train"]
