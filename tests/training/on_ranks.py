"""Work of every rank of `torchrun` in test_ranks.py: on_ranks.py FOLDER."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from conftest import CONSTANT, OPTIONS, RUNTIME, Samples, config
from saeflow.errors import UserError
from saeflow.operators import native, sparse
from saeflow.saes import Ranks
from saeflow.training import train_group

STEPS, D_SAE, DEAD_AFTER = 40, 64, 500
QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
EVERY_STEP = {**RUNTIME, "checkpoint_every_s": 0}
BREAKS_AT = 17
PENALISED = "penalised"
"""A TopK SAE with a penalty on similar directions, which no row of the batch decides."""
UNDERUSED = "underused"
"""A BatchTopK SAE whose AuxK trains underused latents, too, from step 100 on."""
ALIGNED = "aligned"
"""A BatchTopK SAE whose encoder and decoder directions have the inner product 1."""

CALMED = {
    # The slope p z^(p - 1) of the penalty has no bound where a latent z begins, so rounding that decides its sign
    # decides the step. At p = 0.4 another order of each batch's rows moves W_dec by 3e-4 in some 5 per cent of trainings.
    "p_anneal": {"p_end": 0.7},
    # Masks at a low temperature, and hard ones, turn a rounding into another choice of latents.
    "soft_topk": {"alpha": 0.2, "alpha_schedule": CONSTANT, "hard_fraction": 0.0},
}
"""Options of variants with which a rounding stays one."""


@contextlib.contextmanager
def acting_as_gpu():
    """Lists of a fixed size, on plain torch, where nothing waits for the device."""
    was = native.is_on, sparse.is_padded
    native.is_on, sparse.is_padded = False, True
    try:
        yield
    finally:
        native.is_on, sparse.is_padded = was


def setting(variant):
    if variant == PENALISED:
        plain = setting("topk")
        added = {"orthogonality_weight": 3.0, "orthogonality_chunk": 40}
        return dataclasses.replace(plain, options={**plain.options, **added})
    if variant == UNDERUSED:
        found = config("batch_topk", steps=110, d_sae=D_SAE, dead_after_tokens=10**6)
        return dataclasses.replace(found, options={**found.options, "auxk_latents": "underused"})
    if variant == ALIGNED:
        plain = setting("batch_topk")
        return dataclasses.replace(plain, options={**plain.options, "aligned": True})
    found = config(variant, steps=STEPS, d_sae=D_SAE, dead_after_tokens=DEAD_AFTER)
    return dataclasses.replace(found, options={**found.options, **CALMED.get(variant, {})})


def breaks(number):
    if number == BREAKS_AT:
        raise OSError("the disk is gone")


def train_here(variant, folder, ranks, store, runtime):
    folder.mkdir(parents=True, exist_ok=True)
    return train_group(store, [(setting(variant), folder, None)], runtime, ranks)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for split in ("batch", "latents"):
        ranks = Ranks.from_environment(split, "cpu")
        for variant in (*OPTIONS, PENALISED, ALIGNED, UNDERUSED):
            folder = root / split / variant
            try:
                train_here(variant, folder, ranks, Samples(), QUIET)
            except UserError as error:
                if ranks.rank == 0:
                    (folder / "refused").write_text(str(error))
        for variant in OPTIONS if split == "batch" else ():
            with acting_as_gpu():
                train_here(variant, root / "as_gpu" / variant, ranks, Samples(), QUIET)
        with contextlib.suppress(OSError):
            train_here(
                "batch_topk", root / split / "broken", ranks, Samples(on_batch=breaks), EVERY_STEP
            )
        train_here(
            "batch_topk", root / split / "moved", ranks, Samples(), QUIET
        )  # begun by one process
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
