"""dictionary_learning: its trainers' own `update`, as `trainSAE` calls it."""

import itertools
from collections.abc import Iterator

from contestant import Case, Work, leave_out, serve

leave_out("nnsight", "wandb")  # of its buffer of activations and its logs
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from torch import Tensor

TRAINERS = {
    "topk": TopKTrainer,
    "batch_topk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "gated": GatedSAETrainer,
    "relu": StandardTrainer,
    "p_anneal": PAnnealTrainer,
}


def build(case: Case, batches: Iterator[Tensor]) -> Work:
    options = {
        "steps": case.steps or 10**9,
        "activation_dim": case.d_in,
        "dict_size": case.d_sae,
        "layer": 0,
        "lm_name": "",
        "device": case.device,
        "lr": 1e-6,
    }
    if case.variant in ("topk", "batch_topk", "matryoshka"):
        options["k"] = case.k
    if case.variant == "matryoshka":
        options["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    trainer = TRAINERS[case.variant]
    if case.steps:
        configuration = {"trainer": trainer, "warmup_steps": 0, **options}

        def loop() -> None:
            data = itertools.islice(batches, case.steps)
            trainSAE(data, [dict(configuration)], case.steps, device=case.device)

        return loop
    training = trainer(**options)
    numbers = itertools.count()

    def step() -> None:
        if case.n_dead:
            training.num_tokens_since_fired[: case.n_dead] = 10**9
        with case.autocast():
            training.update(next(numbers), next(batches))

    return step


if __name__ == "__main__":
    serve(build)
