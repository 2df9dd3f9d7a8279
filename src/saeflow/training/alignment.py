"""Aligned training: the inner product of each latent's encoder and decoder direction is held at 1 (arXiv:2605.18629)."""

import torch
from torch import Tensor

from saeflow.saes import SAE

SMALLEST = 1e-30  # squared norm of a decoder row, where it is divided by


class Alignment:
    """The constraint w_enc_i . w_dec_i = 1 for every latent i, w_enc_i a column of `W_enc` and w_dec_i a row of `W_dec`.

    It is kept as unit decoder rows are: gradients lose the part that would leave the constraint at once, and weights go
    back to the nearest point of it after each update, the decoder's rows to norm 1 first, then each encoder direction
    along its decoder row. The paper's reparameterization was not to be had; docs/paper-against-code.md says what of this
    is the paper's.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.project()

    @torch.no_grad()
    def project(self, skip: Tensor | None = None) -> None:
        """Move each encoder direction to the nearest one whose inner product with its decoder row is 1.

        Args:
            skip: () bool; true: weights stay as they are.
        """
        readers, rows = self.sae.W_enc.t(), self.sae.W_dec
        lacking = 1 - torch.linalg.vecdot(readers, rows)
        if skip is not None:
            lacking = lacking.where(~skip, 0)
        readers.addcmul_((lacking / squares_of(rows))[:, None], rows)

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove, of each encoder direction's gradient, the part along its decoder row, in which it cannot move."""
        if (gradient := self.sae.W_enc.grad) is None:
            return
        rows = self.sae.W_dec
        along = torch.linalg.vecdot(gradient.t(), rows) / squares_of(rows)
        gradient.t().addcmul_(along[:, None], rows, value=-1)


def squares_of(rows: Tensor) -> Tensor:
    """Return the squared norm (n,) of each row (n, d), above 0."""
    return rows.square().sum(1).clamp(min=SMALLEST)
