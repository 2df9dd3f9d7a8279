"""saeflow: the trainer's own step, and its whole run from a store on disk."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from contestant import Case, Work, serve
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn import Drawn, write_drawn

from saeflow.batch import Batch
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.stores import open_store
from saeflow.training.checkpoints import delete_checkpoints
from saeflow.training.memory import keep_freed_memory
from saeflow.training.run import Run
from saeflow.training.trainer import advance

ROWS = 1 << 17
FOREVER = 10**9
CONSTANT = {"kind": "constant"}


def options_of(case: Case) -> dict[str, dict[str, Any]]:
    """Options by what a case may be named."""
    k = {"k": case.k, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}
    penalty = {"l1": 1.0, "l1_schedule": CONSTANT}
    soft = {
        **k, "k_max": 2.0 * case.k, "estimator_width": None, "alpha_schedule": CONSTANT, "budget_weight": 1.0,
        "hard_fraction": 0.1, "hard_phase": "full", "alpha": 1e-4,
    }  # fmt: skip
    attention = {
        "architecture": "shared", "activation": "weights", "query": "identity", "max_rate": None,
        "loss": "squared", "l1": 0.0, "l1_schedule": CONSTANT, "score_scale": 20.0,
    }  # fmt: skip
    return {
        "topk": k,
        "batch_topk": {**k, "threshold_start_step": 0},
        "matryoshka": {
            **k, "threshold_start_step": 0, "groups": {"fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4]}
        },
        "adaptive_k": {
            "form": "per_token", "complexity": "drawn", "k_min": 5 * case.k // 8, "k_max": 11 * case.k // 8,
            "steepness": 4.0, "phase_ratio": 0.5, "probe_weight": 1.0, "l1": 0.001, "alpha": None,
            "auxk_weight": 1 / 32,
        },
        "jumprelu": {
            "l0_weight": 1.0, "l0_schedule": CONSTANT, "target_l0": None, "target_schedule": CONSTANT,
            "threshold": 0.03, "bandwidth": 0.03,
        },
        "gated": penalty,
        "relu": penalty,
        "p_anneal": {**penalty, "p_end": 0.5, "p_updates": 10, "anneal_start": 0.2},
        "soft_topk": soft,
        "soft_topk, narrow estimator": {**soft, "estimator_width": 256},
        "soft_topk, hot": {**soft, "alpha": 0.2},
        "sparsemax": attention,
        "sparsemax, mlp": {**attention, "architecture": "mlp"},
    }  # fmt: skip


class InMemory:
    """Batches as a store gives them."""

    scale, positions, targets = 1.0, slice(0, None), None

    def __init__(self, case: Case, rows: Iterator[Tensor]) -> None:
        self.d_in, self.rows = case.d_in, rows

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        while True:
            yield Batch.of(next(self.rows))

    def last_rows(self) -> "InMemory":
        return self


def make_run(case: Case, store: Any, folder: Path, lr: float = 1e-6) -> Run:
    variant, chosen = case.variant.split(",")[0], options_of(case)[case.variant]
    runtime = {"device": case.device, "precision": case.precision, "checkpoint_every_s": 60}
    training = TrainingConfig(
        tokens=(case.steps or FOREVER) * case.batch, batch_size=case.batch, input_scale="raw", lr=lr,
        betas=(0.9, 0.999), lr_warmup_steps=0, lr_decay_fraction=0.0, grad_clip=1.0, dead_after_tokens=FOREVER,
        train_decoder=True, log_every_steps=100,
    )  # fmt: skip
    config = SAEConfig(
        name=f"drawn/drawn/{variant}/0", entry=variant, variant=variant, source="drawn", hook_point="drawn",
        d_sae=case.d_sae, seed=0, options=chosen, training=training,
    )  # fmt: skip
    return Run(store, config, runtime, folder)


@torch.no_grad()
def settle(case: Case, run: Run, x: Tensor) -> None:
    """Move the biases to where about the asked share of the latents is active, as late in training."""
    sae: Any = run.sae
    rows = sae.pre_activations(x[:256])
    limits = rows.kthvalue(round((1 - case.density) * case.d_sae), dim=1).values
    sae.b_enc.sub_(limits.mean() - (0.03 if case.variant == "jumprelu" else 0))
    if case.variant == "gated":
        sae.b_mag.sub_(limits.mean())
    sae.density.fill_(case.density)


def build(case: Case, batches: Iterator[Tensor]) -> Work:
    keep_freed_memory()
    if case.steps:
        folder = Path(tempfile.mkdtemp())
        store = open_store(write_drawn(Drawn(ROWS, case.d_in, batches), folder))

        def loop() -> None:
            advance([make_run(case, store, folder)])
            delete_checkpoints(folder)

        return loop
    run = make_run(case, InMemory(case, batches), Path("/nonexistent"))
    if case.n_dead:
        with torch.no_grad():  # latents that count as dead never fire, and AuxK can choose them
            run.sae.W_enc[:, : case.n_dead] *= 0.1
    run.sae.settle_dead(case.n_dead)  # which a run knows from the last line of its log
    if case.density:
        settle(case, run, next(batches))
    if case.variant.startswith(
        "soft_topk"
    ):  # not the dense first step; later ones decide by themselves
        run.sae.density.fill_(0.0)

    def step() -> None:
        run.silent[: case.n_dead] = 2 * FOREVER
        run.take(Batch.of(next(batches)), 0.0)

    step.run = run  # type: ignore[attr-defined]  # how it is launched can be looked at
    return step


if __name__ == "__main__":
    serve(build)
