"""Train in a process of its own, slowly enough to be killed: kill_me.py VARIANT FOLDER."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import RUNTIME, Samples, config
from saeflow.training import train

torch.set_num_threads(1)
slowly = Samples(on_batch=lambda number: time.sleep(0.01))
train(slowly, config(sys.argv[1]), RUNTIME, Path(sys.argv[2]))
