"""One thread for every test, and a store held in memory with the reading side of a real one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


class MemoryStore:
    """The reading side of a store, over an array."""

    def __init__(self, x: np.ndarray, **columns: np.ndarray) -> None:
        self.x, self.columns, self.path = torch.tensor(x, dtype=torch.float32), columns, Path("m")
        self.rows, self.d_in = self.x.shape
        self.mean = self.x.double().mean(0)

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.rows, batch_size):
            yield start, self.x[start : start + batch_size]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.columns[name][start:stop]


@pytest.fixture
def memory_store() -> type[MemoryStore]:
    return MemoryStore


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
