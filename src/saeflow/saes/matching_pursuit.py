"""Matching pursuit SAE: latents are taken one after the other until little is left (Costa et al. 2025, arXiv:2506.03093)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.config.options import VariantOptions, option
from saeflow.errors import UserError
from saeflow.operators import SparseLatents, geometric_median, matching_pursuit
from saeflow.saes.base import SAE
from saeflow.saes.contract import Factors
from saeflow.saes.initialisation import directions


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitOptions(VariantOptions):
    """Options of `matching_pursuit`; defaults are SAELens's. The paper takes a fixed number of steps."""

    residual_threshold: float = option(
        "Norm of the residual below which an input takes no more latents; 0 for no such rule.",
        default=0.01,
        unit="scaled activations",
        low=0,
        high=1e30,
    )
    max_iterations: int | None = option(
        "Steps of an input at most, each of which takes one latent; null is the width of the activations.",
        default=None,
        low=1,
    )
    stop_on_duplicate_support: bool = option(
        "Stop an input after a step that takes a latent which it had already.", default=True
    )

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if self.aligned:
            yield "aligned: expected false, since the decoder's unit rows are the encoder already, found true."


class MatchingPursuit(SAE):
    """z by a pursuit of x - b_dec with the rows of W_dec, which are the encoder too (`operators.matching_pursuit`).

    The stopping rule decides how many latents an input has. The loss is the error alone. A pass costs one encoder
    product a step, on any device; its path is the dense one.
    """

    Options = MatchingPursuitOptions

    of_latents = ("W_dec",)
    divides_latents = False  # each step looks for the largest of all products
    takes_own_targets = False  # the decoder reads the inputs

    threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, options: MatchingPursuitOptions) -> None:
        super().__init__(d_in, d_sae)
        for name in ("W_enc", "b_enc"):
            self.register_parameter(name, None)
        self.most_steps = d_in if options.max_iterations is None else options.max_iterations
        self.stops_on_repeat = options.stop_on_duplicate_support
        self.register_buffer("threshold", torch.tensor(options.residual_threshold))

    @torch.no_grad()
    def initialise(self, batch: Batch | Tensor, generator: torch.Generator) -> None:
        self.W_dec.copy_(directions(self.d_sae, self.d_in, generator))
        self.b_dec.copy_(geometric_median(Batch.of(batch).target))

    def condition(self, x: Tensor) -> Tensor | None:
        return (x - self.b_dec).to(self.W_dec.dtype)

    def factors(self, x: Tensor) -> Factors:
        return x, self.W_dec.t(), self.W_dec.new_zeros(self.d_sae), self.centre

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return matching_pursuit(
            condition,
            self.W_dec,
            self.threshold,
            self.most_steps,
            stops_on_repeat=self.stops_on_repeat,
        )

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return SparseLatents.from_mask(pre_acts, self.activate(pre_acts, condition) > 0)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        latents = self.activate(selected.values, condition)
        return selected.with_values(latents.reshape(-1)[selected.flat])

    def readers(self) -> tuple[Tensor, Tensor]:
        """Return the readers of a pursuit's first step."""
        return self.W_dec.t(), self.W_dec.new_zeros(self.d_sae)

    def freeze_decoder(self) -> None:
        raise UserError("train_decoder: the rows of W_dec are encoder and decoder at once.")

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        self.b_dec.mul_(scale)
        self.threshold.mul_(scale)
