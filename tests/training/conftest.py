"""A training store in memory, of samples of a few known features."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saeflow.config import SAEConfig, TrainingConfig

D_IN, FEATURES, ACTIVE = 16, 24, 3
RUNTIME = {"device": "cpu", "precision": "fp32", "threads": 1, "checkpoint_every_s": 0.05}
OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {
        "k": 3,
        "k_schedule": {"kind": "linear", "from": 12, "until": 0.3},
        "auxk_weight": 1 / 32,
    },
    "batch_topk": {"k": 3, "k_schedule": {"kind": "constant"}, "auxk_weight": 1 / 32},
    "relu": {"l1": 0.5, "l1_schedule": {"kind": "linear", "from": 0, "until": 0.1}},
}


class Samples:
    """Endless batches, each made from its number alone."""

    d_in = D_IN

    def __init__(self, scale: float = 3.0, on_batch: Callable[[int], None] | None = None) -> None:
        self.scale = scale
        self.on_batch = on_batch
        features = torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(5))
        self.features = features / features.norm(dim=1, keepdim=True)

    def batch(self, batch_size: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.rand(batch_size, FEATURES, generator=generator).topk(ACTIVE).indices
        values = 1 + torch.rand(batch_size, ACTIVE, generator=generator)
        x = (values[..., None] * self.features[chosen]).sum(1)
        return self.scale * x * (D_IN / ACTIVE / 2.3) ** 0.5

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        for number in itertools.count(start_batch):
            if self.on_batch:
                self.on_batch(number)
            yield self.batch(batch_size, number)


def config(variant: str, steps: int = 300, d_sae: int = 32, **changes: Any) -> SAEConfig:
    training = {
        "tokens": 128 * steps, "batch_size": 128, "lr": 3e-3, "betas": (0.9, 0.999), "lr_warmup_steps": 10,
        "lr_decay_fraction": 0.2, "grad_clip": 1.0, "dead_after_tokens": 2000, "train_decoder": True,
        "log_every_steps": 10, **changes,
    }  # fmt: skip
    return SAEConfig(
        name=f"memory/features/{variant}/d{d_sae}-seed0", entry=variant, variant=variant, source="memory",
        hook_point="features", d_sae=d_sae, seed=0, options=OPTIONS[variant], training=TrainingConfig(**training),
    )  # fmt: skip
