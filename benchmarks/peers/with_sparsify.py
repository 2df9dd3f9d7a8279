"""sparsify: the steps of its `Trainer.fit`, which reads activations from a model only.

With Adam, as the others, instead of its default, signum.
"""

from collections.abc import Iterator

import torch
from contestant import Case, Work, serve
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

AUXK_WEIGHT = 1 / 32


def build(case: Case, batches: Iterator[Tensor]) -> Work:
    sae = SparseCoder(
        case.d_in, SparseCoderConfig(num_latents=case.d_sae, k=case.k), device=case.device
    )
    sae.b_dec.data = next(batches).mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-6)
    dead = torch.zeros(case.d_sae, dtype=torch.bool, device=case.device)
    dead[: case.n_dead] = True

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        fired = torch.zeros_like(dead)
        with case.autocast():
            out = sae(next(batches), dead_mask=dead)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + AUXK_WEIGHT * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def loop() -> None:
        for _ in range(case.steps):
            step()

    return loop if case.steps else step


if __name__ == "__main__":
    serve(build)
