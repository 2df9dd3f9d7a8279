"""Sparsemax SAE: an input attends to shared concepts, most of them with weight 0 (arXiv:2604.14925)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeflow.batch import Batch
from saeflow.config.options import VariantOptions, option
from saeflow.errors import UserError
from saeflow.operators import (
    SparseLatents,
    acts_as_gpu,
    sparsemax,
    sparsemax_of,
    sparsemax_sparse,
)
from saeflow.operators.gpu.units import unit_rows
from saeflow.operators.sparsemax import only
from saeflow.saes.base import SAE
from saeflow.saes.contract import Factors
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import directions, kaiming, uniform
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule

RATE_DECAY = 0.99
MOST = 256  # concepts of one input: a GPU makes room for these, and for more once an input has them


@dataclass(frozen=True, kw_only=True)
class SparsemaxOptions(VariantOptions):
    """Options of `sparsemax`; defaults are the paper's (arXiv:2604.14925)."""

    architecture: Literal["shared", "mlp"] = option(
        "shared: cross-attention to shared concepts; mlp: an encoder and a decoder of its own.",
        default="shared",
    )
    activation: Literal["weights", "scores", "relu"] = option(
        "weights: the sparsemax itself (the paper); scores: s where the sparsemax is above 0, with no gradient through the "
        "threshold (the released code; such a latent may be negative); relu: relu(s), the ablation.",
        default="weights",
    )
    query: Literal["identity", "linear"] = option(
        "identity, or linear for a learned W_Q (architecture shared only).", default="identity"
    )
    score_scale: float | Literal["1/sqrt(d)", "learned"] = option(
        "Factor of the scores: a number; 1/sqrt(d); or learned, from 1 on.",
        default="1/sqrt(d)",
        low=1e-8,
        high=1e8,
    )
    max_rate: float | None = option(
        "Firing rate in training above which a latent is left out, also in use; null keeps all.",
        default=None,
        above=0,
        high=1,
    )
    rate_mask: Literal["excluded", "zeroed"] = option(
        "Treatment of latents above max_rate. excluded: the rate is a running mean (decay 0.99) of how often a latent "
        "is not 0, and those left out have the score -inf; zeroed: it is the mean over all batches of how often it is above "
        "0, and they have the score 0, which the simplex may still choose (released code).",
        default="excluded",
    )
    loss: Literal["squared", "norm_weighted"] = option(
        "squared: the error is summed over d_in; norm_weighted: 10 mean((x - x_hat)^2 / ||x||) (released code).",
        default="squared",
    )
    l1: float = option(
        "Weight of sum |z| / ||x||, the mean over the batch, at the end of its schedule; 0 in the paper where sparsity is "
        "sparsemax's.",
        default=0,
        low=0,
        high=1e30,
    )
    l1_schedule: ScheduleForm = option(
        "Schedule by which l1 reaches its value.", default={"kind": "constant"}
    )
    beta2: float = option("beta2 of Adam; beta1 is 0.9.", default=0.99, low=0, high=0.999999)
    initialisation: Literal["unit", "kaiming"] = option(
        "unit: random unit concepts and every map the identity (mlp: as other variants); kaiming: concepts uniform within "
        "sqrt(6 / d_sae) of 0 and maps within sqrt(6 / d_in), so that scores have a standard deviation of 2 / sqrt(d_sae) "
        "(released code; mlp: as relu).",
        default="unit",
    )

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if self.aligned:
            yield (
                "aligned: expected false, since scores are of unit vectors and have a scale of their own, found true."
            )
        if self.query == "linear" and self.architecture == "mlp":
            yield "query: expected identity with the architecture mlp, found 'linear'."

    def misfits(self, source: Mapping[str, Any], input_scale: str) -> Iterator[str]:
        if self.architecture == "shared" and input_scale == "centred":
            yield (
                "input_scale: centred takes the mean row away, which a saved SAE gives back in its b_dec; architecture "
                "shared has none. Set unit or raw for this entry, or take architecture mlp."
            )


class Sparsemax(SAE):
    """z = ||c|| sparsemax(s) with scores s of the unit vector c / ||c||, c = x - b_dec.

    `architecture: shared` is cross-attention, with concepts C = W_dec (d_sae, d_in) and no bias:
    s = scale q W_Q W_K^T C^T, x_hat = z C W_V. Products are taken in the order that never builds the keys
    C W_K or values C W_V, which would cost a matrix product over d_sae each. `mlp` has an encoder and a
    decoder of its own: s = scale (q W_enc + b_enc), x_hat = z W_dec + b_dec. The norm is a part of the
    latents, so that `decode` needs them alone, and both forms take activations of any unit.
    """

    Options = SparsemaxOptions

    has_unit_norm = False
    l1 = Moving[float]()
    divides_latents = False
    takes_own_targets = False  # scores are of unit vectors, and latents carry the norm of the input
    constants = ("nothing",)
    nothing: Tensor  # (d_in,) zeros, what the encoder subtracts from units
    firing_rate: Tensor
    batches: Tensor

    def __init__(self, d_in: int, d_sae: int, options: SparsemaxOptions) -> None:
        super().__init__(d_in, d_sae)
        self.betas = (0.9, options.beta2)
        self.initialisation = options.initialisation
        self.is_shared = options.architecture == "shared"
        self.activation = options.activation
        self.loss = options.loss
        self.schedule = make_schedule("l1", options.l1, options.l1_schedule, 0, float("inf"))
        self.l1 = self.schedule.target
        self.max_rate = options.max_rate
        scale, is_learned = read_scale(options.score_scale, d_in)
        self.score_scale = nn.Parameter(torch.tensor(scale), requires_grad=is_learned)
        if self.is_shared:
            for name in ("W_enc", "b_enc", "b_dec"):
                self.register_parameter(name, None)
            self.W_K = nn.Parameter(torch.zeros(d_in, d_in))
            self.W_V = nn.Parameter(torch.zeros(d_in, d_in))
            self.W_Q = nn.Parameter(torch.zeros(d_in, d_in)) if options.query == "linear" else None
        self.register_buffer("firing_rate", torch.zeros(d_sae))
        self.register_buffer("nothing", torch.zeros(d_in), persistent=False)
        self.is_zeroed = options.rate_mask == "zeroed"
        if self.is_zeroed:
            self.register_buffer("batches", torch.zeros(()))

    def initialise(self, batch: Batch | Tensor, generator: torch.Generator) -> None:
        if not self.is_shared:
            return super().initialise(batch, generator)
        maps = [matrix for matrix in (self.W_K, self.W_V, self.W_Q) if matrix is not None]
        with torch.no_grad():
            if self.initialisation == "kaiming":
                uniform(self.W_dec, kaiming(self.d_sae), generator)
                for matrix in maps:
                    uniform(matrix, kaiming(self.d_in), generator)
                return None
            self.W_dec.copy_(directions(self.d_sae, self.d_in, generator))
            for matrix in maps:
                matrix.copy_(torch.eye(self.d_in))
        return None

    @property
    def is_sparse(self) -> bool:
        return self.activation != "relu"

    def freeze_decoder(self) -> None:
        if self.is_shared:
            raise UserError("train_decoder: the shared concepts are encoder and decoder at once.")
        super().freeze_decoder()

    @property
    def subtracted(self) -> Tensor | None:
        """(d_in,) what is taken from inputs before their norm; None: nothing."""
        return None if self.is_shared else self.b_dec

    def condition(self, x: Tensor) -> Tensor | None:
        centred = x if self.subtracted is None else x - self.subtracted
        result: Tensor | None = torch.linalg.vector_norm(centred, dim=1)
        return result

    def condition_and_factors(self, x: Tensor) -> tuple[Tensor | None, Factors]:
        if not acts_as_gpu(x):
            return super().condition_and_factors(x)
        unit, norm = unit_rows(x, self.subtracted, self.score_scale)
        return norm, self.factors_of(unit)

    def encoder_input(self, unit: Tensor) -> Tensor:
        """(B, d_in) what the scores are linear in, of scaled unit rows."""
        if not self.is_shared:
            return unit
        query = unit if self.W_Q is None else unit @ self.W_Q
        return query @ self.W_K.t()

    def encoder(self) -> tuple[Tensor, Tensor]:
        """(d_in, d_sae) and the bias (d_sae,)."""
        if self.is_shared:
            return self.W_dec.t(), self.W_dec.new_zeros(self.d_sae)
        return self.W_enc, self.b_enc * self.score_scale

    def factors(self, x: Tensor) -> Factors:
        return self.factors_of(unit_rows(x, self.subtracted, self.score_scale)[0])

    def factors_of(self, unit: Tensor) -> Factors:
        """Return `factors`, of scaled unit rows (B, d_in)."""
        return self.encoder_input(unit), *self.encoder(), self.nothing

    @property
    def adds_up(self) -> bool:
        return not self.is_shared

    def rebuild(self, part: Tensor) -> Tensor:
        return part @ self.W_V if self.is_shared else super().rebuild(part)

    def directions(self) -> Tensor:
        return self.W_dec @ self.W_V if self.is_shared else self.W_dec

    def readers(self) -> tuple[Tensor, Tensor]:
        """Return the readers of the scores, in units where x - b_dec has unit norm."""
        matrix, bias = self.encoder()
        if not self.is_shared:
            return matrix * self.score_scale, bias
        query = self.W_K.t() if self.W_Q is None else self.W_Q @ self.W_K.t()
        return query @ matrix * self.score_scale, bias

    # Selection.

    def probabilities(self, scores: Tensor) -> Tensor:
        """(B, n) scores to their projection on the simplex."""
        return sparsemax(scores)

    def probabilities_of(self, scores: SparseLatents, sizes: Tensor | None = None) -> SparseLatents:
        """The same of a list of scores, if those that are absent have none; times the size of each row (B,)."""
        return sparsemax_of(scores, sizes)

    def support(
        self, scores: Tensor, margin: Tensor | float, allowed: Tensor | None
    ) -> SparseLatents:
        """Those of the allowed scores that have a probability, or may within a margin; without gradient."""
        return sparsemax_sparse(scores, margin, self.room, allowed)

    @property
    def most(self) -> int:
        return MOST

    @property
    def allowed(self) -> Tensor | None:
        """(d_sae,) bool: latents that do not fire too often to be used; None: all may."""
        return None if self.max_rate is None else self.firing_rate <= self.max_rate

    def used(self, pre_acts: Tensor) -> Tensor:
        """Scores, without those of latents that fire too often."""
        if self.is_zeroed and self.allowed is not None:
            return pre_acts.masked_fill(~self.allowed, 0.0)
        return only(pre_acts, self.allowed)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        scores = self.used(pre_acts)
        if self.activation == "relu":
            z = scores.relu()
        elif self.activation == "weights":
            z = self.probabilities(scores)
        else:
            z = scores.where(self.probabilities(scores.detach()) > 0, 0)
        return z * condition[:, None]

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        if self.activation == "relu":
            return SparseLatents.from_above(self.used(pre_acts), 0, self.room)
        if self.is_zeroed:
            return self.support(self.used(pre_acts), margin, None)
        return self.support(pre_acts, margin, self.allowed)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        assert condition is not None
        if self.max_rate is not None and self.is_zeroed:
            is_masked = selected.of_columns((self.firing_rate > self.max_rate).float()) > 0
            selected = selected.with_values(selected.values.masked_fill(is_masked, 0))
        if self.activation == "weights":
            return self.probabilities_of(selected, condition)
        z = selected
        if self.activation == "scores":
            is_chosen = self.probabilities_of(selected.detach()).values > 0
            z = z.with_whole(z.values * is_chosen)
        return z.scaled(condition)

    # Training.

    def begin_step(self, step: int, total: int) -> None:
        self.l1 = self.schedule(step, total)

    def dials(self) -> dict[str, object]:
        return {**super().dials(), "has_l1": self.l1 > 0}

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        losses = super().losses(fwd, dead)
        if self.l1:
            assert fwd.condition is not None
            norm = fwd.condition.detach().clamp(min=1e-12)
            of_rows = (
                fwd.latents.of_rows(norm)
                if isinstance(fwd.latents, SparseLatents)
                else norm[:, None]
            )
            penalty = self.sum_over_rows((fwd.values.abs() / of_rows).sum())
            losses["l1"] = self.moved("l1") * penalty / self.rows(fwd.x)
        return losses

    def reconstruction(self, fwd: Forward) -> Tensor:
        if self.loss == "norm_weighted":
            return 10 * self.norm_weighted_error(fwd)
        return super().reconstruction(fwd)

    @torch.no_grad()
    def end_step(self, fwd: Forward) -> None:
        if self.max_rate is None:
            return
        if isinstance(fwd.latents, SparseLatents):
            counts = (fwd.latents.relu() if self.is_zeroed else fwd.latents).count()
        else:
            counts = (fwd.latents > 0 if self.is_zeroed else fwd.latents != 0).sum(0)
        counts = self.sum_over_rows(counts)
        rate = (counts / self.rows(fwd.x)).to(self.firing_rate.dtype)
        if self.is_zeroed:
            total = (
                self.firing_rate * self.batches + rate
            )  # exact for few rows: rates lie at max_rate
            self.firing_rate.copy_(total / self.batches.add_(1))
        else:
            self.firing_rate.lerp_(rate, 1 - RATE_DECAY)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        if not self.is_shared:  # scores are of unit vectors, latents carry the norm
            self.b_dec.mul_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        facts = {"score_scale": float(self.score_scale.detach())}
        if self.l1:
            facts["l1_weight"] = self.l1
        if self.max_rate is not None:
            facts["masked"] = float((self.firing_rate > self.max_rate).double().mean())
        return facts


def read_scale(value: float | str, d_in: int) -> tuple[float, bool]:
    """A score scale from its option, and whether it is learned."""
    if isinstance(value, str):
        return (1.0, True) if value == "learned" else (d_in**-0.5, False)
    return value, False
