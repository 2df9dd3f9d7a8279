"""A training store in memory, of samples of a few known features."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.config import SAEConfig, TrainingConfig

D_IN, FEATURES, ACTIVE = 16, 24, 3
RUNTIME = {"device": "cpu", "precision": "fp32", "threads": 1, "checkpoint_every_s": 0.05}
CONSTANT = {"kind": "constant"}
WARM = {"kind": "linear", "from": 0, "until": 0.1}
ATTENTION = {
    "architecture": "mlp", "activation": "weights", "query": "identity", "score_scale": 6.0,
    "max_rate": None, "loss": "squared", "l1": 0.0, "l1_schedule": CONSTANT,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive_k": {
        "form": "per_token", "complexity": "labels", "k_min": 2, "k_max": 20, "steepness": 6.0,
        "phase_ratio": 0.9, "probe_weight": 0.05, "l1": 0.005, "alpha": None, "auxk_weight": 1 / 32,
    },
    "abs_topk": {"k": 3, "k_schedule": CONSTANT, "auxk_weight": 1 / 32},
    "top_afa": {"afa_weight": 1 / 32, "auxk_weight": 1 / 32},
    "topk": {
        "k": 3,
        "k_schedule": {"kind": "linear", "from": 12, "until": 0.3},
        "auxk_weight": 1 / 32,
    },
    "batch_topk": {
        "k": 3, "k_schedule": CONSTANT, "auxk_weight": 1 / 32, "threshold_start_step": 5
    },
    "entmax": {**ATTENTION, "alpha": 1.9, "is_alpha_learned": True, "score_scale": 12.0},
    "feature_choice": {
        "k": 3, "k_schedule": CONSTANT, "auxk_weight": 1 / 32, "mutual_fraction": 0.3, "threshold_start_step": 5
    },
    "gated": {"l1": 2.0, "l1_schedule": WARM},
    "jumprelu": {
        "l0_weight": 1.0, "l0_schedule": WARM, "target_l0": 3.0,
        "target_schedule": {"kind": "linear", "from": 12, "until": 0.3}, "threshold": 0.3,
        "bandwidth": 0.5,
    },
    "matching_pursuit": {
        "residual_threshold": 0.8, "max_iterations": 6, "stop_on_duplicate_support": True
    },
    "matryoshka": {
        "k": 3, "k_schedule": CONSTANT, "auxk_weight": 1 / 32, "threshold_start_step": 5,
        "groups": {"fractions": [0.75]},
    },
    "p_anneal": {
        "l1": 0.4, "l1_schedule": WARM, "p_end": 0.4, "p_updates": 10, "anneal_start": 0.3
    },
    "relu": {"l1": 0.5, "l1_schedule": WARM},
    "soft_topk": {
        "k": 3, "k_schedule": {"kind": "linear", "from": 12, "until": 0.3}, "k_max": 12.0,
        "estimator_width": 16, "alpha": 1e-3,
        "alpha_schedule": {"kind": "exponential", "from": 1.0, "until": 0.3}, "budget_weight": 1.0,
        "hard_fraction": 0.2, "hard_phase": "full", "auxk_weight": 1 / 32,
    },
    "sparsemax": {**ATTENTION, "max_rate": 0.9},
}  # fmt: skip


class Samples:
    """Endless batches, each made from its number alone."""

    d_in, positions, targets = D_IN, slice(0, None), None

    def __init__(self, scale: float = 3.0, on_batch: Callable[[int], None] | None = None) -> None:
        self.scale = scale
        self.model = None
        self.on_batch = on_batch
        features = torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(5))
        self.features = features / features.norm(dim=1, keepdim=True)
        self.mean = Samples.batch(self, 4096, 99_999).double().mean(0)

    def batch(self, batch_size: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.rand(batch_size, FEATURES, generator=generator).topk(ACTIVE).indices
        values = 1 + torch.rand(batch_size, ACTIVE, generator=generator)
        x = (values[..., None] * self.features[chosen]).sum(1)
        return self.scale * x * (D_IN / ACTIVE / 2.3) ** 0.5

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        for number in itertools.count(start_batch):
            if self.on_batch:
                self.on_batch(number)
            yield Batch.of(self.batch(batch_size, number))


def config(variant: str, steps: int = 300, d_sae: int = 32, **changes: Any) -> SAEConfig:
    training = {
        "tokens": 128 * steps, "batch_size": 128, "input_scale": "dimension", "lr": 3e-3, "betas": (0.9, 0.999), "lr_warmup_steps": 10,
        "lr_decay_fraction": 0.2, "grad_clip": 1.0, "dead_after_tokens": 2000, "train_decoder": True,
        "log_every_steps": 10, **changes,
    }  # fmt: skip
    return SAEConfig(
        name=f"memory/features/{variant}/d{d_sae}-seed0", entry=variant, variant=variant, source="memory",
        hook_point="features", d_sae=d_sae, seed=0, options=OPTIONS[variant], training=TrainingConfig(**training),
    )  # fmt: skip
