"""SoftSAE: a network decides how many latents each input uses, through a soft top-k (arXiv:2605.06610)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from saeflow.batch import Batch
from saeflow.config.options import AuxKOptions, Form, option
from saeflow.operators import perceptron
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import directions
from saeflow.saes.per_input_k import PerInputK
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule

BETA = 5.0  # of the budget's softplus


TimesK = Annotated[
    Mapping[str, float],
    Form(
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["times_k"],
            "properties": {"times_k": {"type": "number", "minimum": 1}},
        }
    ),
]


@dataclass(frozen=True, kw_only=True)
class SoftTopKOptions(AuxKOptions):
    """Options of `soft_topk`; defaults are the paper's (arXiv:2605.06610)."""

    k: int = option(
        "The budget: active latents of an input on average, at the end of its schedule.",
        unit="latents",
        counts_latents=True,
    )
    k_schedule: ScheduleForm = option(
        "Schedule by which the budget reaches its value.",
        default={"kind": "constant"},
        counts_latents=True,
    )
    k_max: float | TimesK = option(
        "The largest k_hat, of which k_hat starts at about a half: a number, or {times_k: m} for m k (2 in the released "
        "language-model runs; 2 d_in in those on images).",
        default={"times_k": 2},
        unit="latents",
        counts_latents=True,
    )
    estimator_width: int | None = option(
        "Hidden units of the network that chooses k_hat; null for d_sae (the released code's: one more dense product a "
        "step). The first units start as the encoder's directions.",
        default=None,
        unit="units",
        low=1,
    )
    alpha: float = option(
        "Temperature of the soft top-k at the end of its schedule.",
        default=1e-4,
        unit="scaled activations",
        low=1e-8,
        high=1e8,
    )
    alpha_schedule: ScheduleForm = option(
        "Schedule by which alpha reaches its value.", default={"kind": "constant"}
    )
    budget_weight: float = option(
        "Weight of the budget loss, lambda_k.", default=1.0, low=0, high=1e30
    )
    hard_fraction: float = option(
        "Share of the steps, the last ones, with the hard top-k.", default=0.04, low=0, high=1
    )
    hard_phase: Literal["full", "decoder"] = option(
        "Parameters that the error trains while the top-k is hard: full, encoder and decoder; decoder, the decoder alone (released code), beside "
        "AuxK, which still trains the encoder's columns of dead latents.",
        default="full",
    )
    reach: float = option(
        "Temperatures below the threshold of the soft top-k down to which a latent counts as active and alive: 30 "
        "leaves out masks below 5e-14, 103 nothing that float32 holds (released code).",
        default=30,
        unit="temperatures",
        low=30,
        high=103,
    )

    @property
    def largest_k(self) -> float:
        """The largest k_hat."""
        return self.k * self.k_max["times_k"] if isinstance(self.k_max, Mapping) else self.k_max

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if not self.k <= self.largest_k <= d_sae:
            where = "k_max.times_k" if isinstance(self.k_max, Mapping) else "k_max"
            yield (
                f"{where}: expected a number in {self.k}..{d_sae} (k and d_sae), found {self.largest_k:g}."
            )


class SoftTopK(PerInputK):
    """k_hat = clamp(k_max sigmoid(MLP(x - b_dec)), 1, d_sae); z = v soft_topk(v, k_hat, alpha).

    The loss adds budget_weight * softplus_5(mean k_hat - k): a mean k_hat above k costs, one below does
    not. For the last `hard_fraction` of the steps, and in use, z is the hard top-floor(k_hat), with no
    budget loss, and k_hat has no gradient.
    """

    Options = SoftTopKOptions

    divides_latents = False
    takes_own_targets = False  # `hidden` reads inputs too
    k = Moving[float]()

    def __init__(self, d_in: int, d_sae: int, options: SoftTopKOptions) -> None:
        super().__init__(d_in, d_sae)
        self.k = options.k
        self.schedule = make_schedule("k", options.k, options.k_schedule, 1, d_sae)
        self.k_max = options.largest_k
        self.temperature = options.alpha
        self.alpha_schedule = make_schedule(
            "alpha", options.alpha, options.alpha_schedule, 1e-8, 1e8
        )
        self.budget_weight = options.budget_weight
        self.hard_fraction = options.hard_fraction
        self.hard_phase = options.hard_phase
        self.reach = options.reach
        self.auxk_weight = options.auxk_weight
        width = d_sae if options.estimator_width is None else options.estimator_width
        self.hidden = nn.Linear(d_in, width)
        self.output = nn.Linear(width, 1)
        with torch.no_grad():
            for parameter in (*self.hidden.parameters(), *self.output.parameters()):
                parameter.zero_()

    def initialise(self, batch: Batch | Tensor, generator: torch.Generator) -> None:
        super().initialise(batch, generator)
        width = len(self.hidden.weight)
        with torch.no_grad():
            more = directions(max(0, width - self.d_sae), self.d_in, generator)
            self.hidden.weight.copy_(torch.cat((self.W_dec[:width], more)))
            bound = width**-0.5
            self.output.weight.uniform_(-bound, bound, generator=generator)

    @property
    def most_k(self) -> int:
        return min(math.ceil(min(self.k_max, self.d_sae)), self.d_sae)

    def begin_step(self, step: int, total: int) -> None:
        self.k = self.schedule(step, total)
        is_hard = step >= round((1 - self.hard_fraction) * total)
        self.temperature = 0.0 if is_hard else self.alpha_schedule(step, total)
        self.is_fixed = is_hard and self.hard_phase == "decoder"

    def k_hat(self, x: Tensor) -> Tensor:
        within = float(self.k_max), 1.0, float(self.d_sae)
        return perceptron(x, self.hidden, self.output, self.centre, within)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        losses = super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}
        if self.is_soft:
            assert fwd.condition is not None
            over = self.mean_over_rows(fwd.condition) - self.moved("k")
            losses["budget"] = self.budget_weight * softplus(over, beta=BETA)
        return losses

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.hidden.weight.div_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        assert fwd.condition is not None
        k_hat = self.of_all_rows(fwd.condition.detach())
        return {
            "k": self.k,
            "k_hat": float(k_hat.mean()),
            "k_hat_std": float(k_hat.std()),
            "temperature": self.temperature,
        }
