"""The learning rate of a step."""

import math

from saeflow.config import SAEConfig, TrainingConfig

_LR_AUTO, _LR_AUTO_WIDTH = 2e-4, 2**14  # Gao et al. 2024, scaled as 1/sqrt(d_sae)


def peak_lr(config: SAEConfig) -> float:
    """The learning rate, or 2e-4 / sqrt(d_sae / 2^14) for `auto`."""
    if config.training.lr == "auto":
        return _LR_AUTO / math.sqrt(config.d_sae / _LR_AUTO_WIDTH)
    return float(config.training.lr)


def lr_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over `lr_warmup_steps`, linear decay to 0 over the last `lr_decay_fraction`."""
    decay_steps = config.lr_decay_fraction * total
    return warm_up(step, config) * (min(1.0, (total - step) / decay_steps) if decay_steps else 1.0)


def warm_up(step: int, config: TrainingConfig) -> float:
    """Factor of the learning rate `step` steps after a warm-up began; 0 before."""
    return min(1.0, max(0, step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
