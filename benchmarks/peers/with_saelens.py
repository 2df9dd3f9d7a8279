"""SAELens: its trainer's own step, and its `fit`."""

from collections.abc import Iterator

from contestant import Case, Work, leave_out, serve

leave_out("wandb")  # of its logs
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


def build(case: Case, batches: Iterator[Tensor]) -> Work:
    size = {"d_in": case.d_in, "d_sae": case.d_sae, "device": case.device}
    if case.variant == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=case.k))
    elif case.variant == "topk, sparse option":
        sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=case.k, **sparse))
    elif case.variant == "batch_topk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=case.k))
    elif case.variant == "matryoshka":
        widths = [
            case.d_sae // 32,
            case.d_sae * 3 // 32,
            case.d_sae * 7 // 32,
            case.d_sae * 15 // 32,
        ]
        config = MatryoshkaBatchTopKTrainingSAEConfig(
            **size, k=case.k, matryoshka_widths=[*widths, case.d_sae]
        )
        sae = MatryoshkaBatchTopKTrainingSAE(config)
    elif case.variant == "jumprelu":
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**size))
    elif case.variant == "gated":
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(**size))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**size))
    steps = case.steps or 10**9
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * case.batch,
            train_batch_size_samples=case.batch,
            lr=1e-6,
            lr_end=1e-6,
            device=case.device,
            autocast=case.precision == "bf16",
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches,
    )

    def step() -> None:
        if case.n_dead:
            trainer.n_forward_passes_since_fired[: case.n_dead] = 1e9
        trainer.step(next(batches))
        trainer.n_training_steps += 1

    def loop() -> None:
        trainer.n_training_samples = trainer.n_training_steps = 0
        trainer.fit()

    return loop if case.steps else step


if __name__ == "__main__":
    serve(build)
