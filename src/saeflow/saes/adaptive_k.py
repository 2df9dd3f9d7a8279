"""AdaptiveK SAE: k from a linear probe of the context's complexity (arXiv:2508.17320)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeflow.complexity.files import read_probe
from saeflow.config.options import AuxKOptions, option
from saeflow.errors import UserError
from saeflow.saes.forward import Forward
from saeflow.saes.input_scale import InputScale
from saeflow.saes.per_input_k import PerInputK

LARGEST = 10.0
C_START, C_LOW, C_HIGH = 0.2, 0.01, 0.5
EXAMPLES = 1024  # of the probe's loss, a step


@dataclass(frozen=True, kw_only=True)
class AdaptiveKOptions(AuxKOptions):
    """Options of `adaptive_k`; defaults are the paper's (arXiv:2508.17320), with a k for every token."""

    form: Literal["per_token", "per_context", "soft"] = option(
        "per_token: all rows; per_context: trained on each context's last row (the released code); soft: the soft top-k "
        "with a real k.",
        default="per_token",
    )
    complexity: str = option("The scores that the probe is fitted to, a key of `complexity`.")
    k_min: int = option(
        "Lower end of the map from score to k; k does not reach it (34 of 20..320).",
        default=20,
        unit="latents",
        counts_latents=True,
    )
    k_max: int = option(
        "Upper end of the map from score to k; k does not reach it (306 of 20..320).",
        default=320,
        unit="latents",
        counts_latents=True,
    )
    steepness: float = option("Steepness of the map from score to k.", default=6, low=0, high=1e6)
    phase_ratio: float = option(
        "Share of the steps with the probe at rest, phase 2.", default=0.9, low=0, high=1
    )
    probe_weight: float = option(
        "Weight of the probe's terms in phase 3.", default=0.9, low=0, high=1e30
    )
    l1: float = option("Weight of the L1 term.", default=0.005, low=0, high=1e30)
    alpha: float | None = option(
        "Temperature of the form soft; null with the others.",
        default=None,
        unit="scaled activations",
        low=1e-8,
        high=1e8,
    )
    joint_phase: Literal["consistent", "released"] = option(
        "Phase 3. consistent: as in the class's description; released: the ridge term is ridge |w|^2 / 2, c compares the "
        "probe loss with that of 2 steps before, ridge term included, and acts a step later, and the probe is clipped by "
        "itself and has a learning rate of its own, which warms up from phase 3 on and does not decay.",
        default="consistent",
    )

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if self.k_min > self.k_max:
            yield f"k_min: expected at most k_max ({self.k_max}), found {self.k_min}."
        if (self.alpha is None) == (self.form == "soft"):
            yield f"alpha: expected a number with form soft, null with others, found {self.alpha!r}."

    def misfits(self, source: Mapping[str, Any], input_scale: str) -> Iterator[str]:
        if self.form == "per_context" and source.get("tokens", "cls") != "cls":
            yield (
                "options.form: per_context trains on one row a context, of images the CLS token alone; the source has "
                f"tokens: {source['tokens']}. Take per_token or soft, or a source of tokens: cls."
            )


class AdaptiveK(PerInputK):
    """k(x) = round(k_min + (k_max - k_min) sigmoid(steepness (score / 10 - 1/2))), score = w x + b in 0..10.

    The probe was fitted before (phase 1). It rests for `phase_ratio` of the steps (phase 2), then learns
    with the SAE (phase 3): the loss adds probe_weight * (MSE(score, y) + ridge |w|^2 / n +
    c (|w - w_0| + |b - b_0|)), n scored rows (what the fit minimised, so that phase 3 starts at rest), with c adapted in 0.01..0.5 from 0.2 on: times 0.8 at a step whose probe loss
    is more than 5 % below that of 3 steps before, else times 1.2. A rounded k passes no gradient to the
    probe, the form `soft` does. The released phase 3 is an option (`joint_phase`). The rest of the loss is mean (x - x_hat)^2 + l1 mean |z|_1 / mean |x|_2 +
    AuxK.
    """

    Options = AdaptiveKOptions

    takes_own_targets = False  # the probe reads inputs too
    constants = ("first_w", "first_b", "ridge", "examples", "scores")

    deviation: Tensor
    probe_losses: Tensor

    def __init__(self, d_in: int, d_sae: int, options: AdaptiveKOptions) -> None:
        super().__init__(d_in, d_sae)
        self.form = options.form
        if self.form == "per_context":
            self.trains_on = "last"
        self.complexity = options.complexity
        self.k_min, self.k_max = options.k_min, options.k_max
        self.steepness = options.steepness
        self.phase_ratio = options.phase_ratio
        self.probe_weight = options.probe_weight
        self.l1 = options.l1
        self.auxk_weight = options.auxk_weight
        self.temperature = 0.0 if options.alpha is None else options.alpha
        self.is_consistent = options.joint_phase == "consistent"
        self.apart = () if self.is_consistent else ("probe_w", "probe_b")
        self.probe_w = nn.Parameter(torch.zeros(d_in))
        self.probe_b = nn.Parameter(torch.zeros(()))
        self.is_joint = False
        self.divides_latents = self.form != "soft"
        self.register_buffer("deviation", torch.tensor(C_START))
        self.register_buffer("probe_losses", torch.full((3,), -1.0))
        for name, shape in (("first_w", (d_in,)), ("first_b", ()), ("ridge", ())):
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("examples", torch.zeros(0, d_in), persistent=False)
        self.register_buffer("scores", torch.zeros(0), persistent=False)

    first_w: Tensor
    first_b: Tensor
    ridge: Tensor
    position: Tensor  # () int64, the step
    examples: Tensor
    scores: Tensor

    def take_probe(self, folder: Path, inputs: InputScale) -> None:
        probe = read_probe(folder)
        if probe["weight"].shape != (self.d_in,):
            raise UserError(
                f"{folder}: the probe reads activations of width {len(probe['weight'])}, expected "
                f"{self.d_in}. Fit it on the store that the SAE is trained on."
            )
        weight, scale, shift = probe["weight"], inputs.scale, inputs.shift
        with torch.no_grad():
            self.probe_w.copy_(weight * scale)
            self.probe_b.copy_(probe["bias"] + (0 if shift is None else weight @ shift))
        self.first_w, self.first_b = self.probe_w.detach().clone(), self.probe_b.detach().clone()
        # It weighs |w|^2 of rows divided by the fit's own scale, and is to weigh the same probe alike here.
        self.ridge = probe["ridge"] * (float(probe["scale"]) / scale) ** 2
        self.examples, self.scores = inputs(probe["examples"]), probe["scores"]

    @property
    def most_k(self) -> int:
        return self.k_max

    def begin_step(self, step: int, total: int) -> None:
        self.position.fill_(step)
        self.is_joint = step >= self.apart_from(total)

    def apart_from(self, total: int) -> int:
        return round(self.phase_ratio * total)

    def score(self, x: Tensor) -> Tensor:
        """(n,) complexity of activations (n, d_in), 0..10."""
        return (x @ self.probe_w + self.probe_b).clamp(0, LARGEST)

    def k_hat(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is 2 apart near 256
            score = self.score(x)
        share = torch.sigmoid(self.steepness * (score / LARGEST - 0.5))
        k = self.k_min + (self.k_max - self.k_min) * share
        if self.is_soft:
            return k if self.is_joint else k.detach()
        return k.detach().round()

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        (total,) = fwd.beside or (fwd.values.abs().sum(),)
        losses = {
            "reconstruction": self.mean_over_rows(fwd.squared_errors / self.d_out),
            "l1": self.l1
            * self.sum_over_entries(total)
            / self.sum_over_rows(torch.linalg.vector_norm(fwd.target, dim=1).sum()).clamp(
                min=1e-12
            ),
            "auxk": self.auxk_weight * self.auxk(fwd, dead),
        }
        if self.is_joint and len(self.examples):
            losses["probe"] = self.probe_weight * self.counted_once(self.probe_loss())
        return losses

    def probe_loss(self) -> Tensor:
        """MSE of the score on the probe's own examples, ridge, and distance from the fitted probe."""
        at = torch.arange(min(EXAMPLES, len(self.examples)), device=self.examples.device)
        at = (at + self.position * len(at)) % len(self.examples)
        error = (self.score(self.examples[at]) - self.scores[at]).square().mean()
        ridge = self.ridge * self.probe_w.square().sum()
        moved = self.probe_w - self.first_w
        distance = safe_norm(moved) + (self.probe_b - self.first_b).abs()
        if self.is_consistent:
            self.adapt(error.detach())
            return error + ridge / len(self.examples) + self.deviation * distance
        weight, loss = self.deviation.clone(), error + ridge / 2
        self.adapt(loss.detach())
        return loss + weight * distance

    def adapt(self, loss: Tensor) -> None:
        """c after a step with this probe loss."""
        before = self.probe_losses[-3 if self.is_consistent else -2]
        adapted = self.deviation * torch.where(loss < 0.95 * before, 0.8, 1.2)
        self.deviation.copy_(torch.where(before >= 0, adapted.clamp(C_LOW, C_HIGH), self.deviation))
        self.probe_losses.copy_(torch.cat((self.probe_losses[1:], loss[None])))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.probe_w.div_(scale)

    @torch.no_grad()
    def fold_shift(self, shift: Tensor) -> None:
        super().fold_shift(shift)
        self.probe_b.sub_(self.probe_w @ shift)

    def facts(self, fwd: Forward) -> dict[str, float]:
        assert fwd.condition is not None
        k_hat = self.of_all_rows(fwd.condition.detach().float())
        return {
            "k_hat": float(k_hat.mean()),
            "k_hat_std": float(k_hat.std()),
            "temperature": self.temperature,
            "deviation": float(self.deviation),
        }


def safe_norm(vector: Tensor) -> Tensor:
    """|vector|, with gradient 0 at 0."""
    square = vector.square().sum()
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
