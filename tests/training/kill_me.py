"""Train in a process of its own, slowly enough to be killed: kill_me.py VARIANT FOLDER."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from conftest import RUNTIME, Samples, config

from saeflow.training import train


class Slowly(Samples):
    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        for batch in super().batches(batch_size, seed, start_batch):
            time.sleep(0.005)
            yield batch


torch.set_num_threads(1)
train(Slowly(), config(sys.argv[1]), RUNTIME, Path(sys.argv[2]))
