"""Accuracy of a classification, averaged over classes."""

import torch
from torch import Tensor


class Accuracy:
    """Mean over classes of the share of their images that are right."""

    def __init__(self, n_classes: int) -> None:
        self.right = torch.zeros(n_classes, dtype=torch.int64)
        self.total = torch.zeros(n_classes, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Add images by their scores (n, classes); ties go to the lower class."""
        right = scores.argmax(1) == labels
        self.right += torch.bincount(labels[right], minlength=len(self.right))
        self.total += torch.bincount(labels, minlength=len(self.total))

    def mean(self) -> float:
        """The accuracy over classes that have images."""
        seen = self.total > 0
        return float((self.right[seen] / self.total[seen]).double().mean())
