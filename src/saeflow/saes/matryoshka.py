"""Matryoshka BatchTopK SAE: nested dictionaries in one (Bussmann et al. 2025, arXiv:2503.17547)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.config.options import Form, option
from saeflow.operators import SparseLatents, decode_sparse
from saeflow.operators.autograd import applied
from saeflow.saes.batch_topk import BatchTopK, BatchTopKOptions
from saeflow.saes.forward import Forward

Groups = Annotated[
    Mapping[str, list[float]],
    Form(
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["fractions"],
            "properties": {
                "fractions": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                }
            },
        }
    ),
]


@dataclass(frozen=True, kw_only=True)
class MatryoshkaOptions(BatchTopKOptions):
    """Options of `matryoshka`: those of `batch_topk`, and of the groups."""

    groups: Groups = option(
        "{fractions: [...]}: shares of d_sae of every group but the last, which takes the rest (Bussmann et al. 2025).",
        default={"fractions": [0.03125, 0.0625, 0.125, 0.25]},
    )
    group_mean: Literal["once", "twice"] = option(
        "once: the loss is the mean over prefixes; twice: that mean is divided by their number again, so that the "
        "reconstruction weighs less against AuxK and the clip (dictionary_learning).",
        default="once",
    )

    def boundaries(self, d_sae: int) -> list[int]:
        """Return the end of each group but the last."""
        fractions = self.groups["fractions"]
        return [round(sum(fractions[: i + 1]) * d_sae) for i in range(len(fractions))]

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        ends = self.boundaries(d_sae)
        if any(a >= b for a, b in zip([0, *ends], [*ends, d_sae], strict=True)):
            yield (
                "groups: expected fractions that leave every group, and the rest, at least one of the "
                f"{d_sae} latents, found {self.groups['fractions']}."
            )


class Matryoshka(BatchTopK):
    """BatchTopK whose every prefix of groups must reconstruct: the loss is the mean over prefixes.

    One selection over all latents; prefix g decodes those of the first g groups. AuxK is that of the
    whole.
    """

    Options = MatryoshkaOptions

    boundaries: Tensor

    def __init__(self, d_in: int, d_sae: int, options: MatryoshkaOptions) -> None:
        super().__init__(d_in, d_sae, options)
        self.is_divided_twice = options.group_mean == "twice"
        boundaries = torch.tensor(options.boundaries(d_sae))
        self.register_buffer("boundaries", boundaries, persistent=False)

    def decode_groups(self, latents: SparseLatents) -> Tensor:
        pieces = decode_sparse(latents.split_columns(self.boundaries), self.W_dec)
        return self.sum_over_latents(pieces.view(len(latents), -1, self.d_out))

    @property
    def prefixes(self) -> Tensor:
        return self.boundaries

    def reconstruction(self, fwd: Forward) -> Tensor:
        prefixes = len(self.boundaries) + 1
        if fwd.errors is not None:  # of all prefixes together
            parts = prefixes * (prefixes if self.is_divided_twice else 1)
            return self.sum_over_rows(fwd.errors.squares.sum()) / (self.rows(fwd.x) * parts)
        if isinstance(fwd.latents, Tensor):
            ends = [*self.boundaries.tolist(), self.d_sae]
            x_hats = (fwd.latents[:, :end] @ self.W_dec[:end] + self.b_dec for end in ends)
            total = torch.stack([(fwd.target - x_hat).square().sum() for x_hat in x_hats]).mean()
        else:
            centred = fwd.target - self.output_bias
            total = applied(_NestedErrors, fwd.parts, centred).mean()
        mean = self.sum_over_rows(total) / self.rows(fwd.x)
        return mean / prefixes if self.is_divided_twice else mean

    def divided(self, first: int) -> None:
        self.boundaries = (self.boundaries - first).clamp(0, self.d_sae)


class _NestedErrors(torch.autograd.Function):
    """(G,) squared errors against x (B, d) of the sums of the first g of parts (B, G, d)."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, x: Tensor) -> Tensor:
        errors = parts.cumsum(1).sub_(x[:, None])
        ctx.save_for_backward(errors)
        return torch.stack([error.square().sum() for error in errors.unbind(1)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (errors,) = ctx.saved_tensors
        grads = errors * (2 * grad)[:, None]
        for group in range(len(grad) - 2, -1, -1):  # a part adds to its own prefix and all longer
            grads[:, group] += grads[:, group + 1]
        return grads, -grads[:, 0]
