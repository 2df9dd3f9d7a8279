"""The contract of variants: every method and attribute that a variant may override, with its default.

A variant derives from `saes.base.SAE` (or from `saes.density.FollowsDensity`, where many latents are active at
first and few later) and overrides of `Contract`, in this order:

- always: `Options`, the constructor, and `activate`, the nonlinearity, which is also the reference of what follows;
- its losses: `losses` or `reconstruction`, from a `Forward`, with the sums and means of `Totals`;
- what differs by input (its k, its norm): `condition`, computed once for both paths;
- numbers that a schedule moves: a `Moving` attribute, set in `begin_step`;
- statistics of training: a buffer, updated in `end_step`; numbers for steps.csv: `facts`;
- parameters or buffers in units of activations: `fold_scale`, `fold_shift`; with an entry for each latent: `of_latents`;
- where few latents are active, for speed: `is_sparse`, `most`, `select`, `activate_selected`, which must give the
  values and gradients of `activate`;
- another encoder or decoder: `centre`, `factors`, `rebuild`, `directions`, `readers`.

Everything else has a default that most variants keep. No variant reads `ranks`.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeflow.batch import Batch
from saeflow.config.options import VariantOptions
from saeflow.operators import SparseLatents, acts_as_gpu
from saeflow.operators.gpu.lists import capacity_for
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import initialise
from saeflow.saes.input_scale import InputScale
from saeflow.saes.totals import Totals

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs, matrix, bias and centre of the encoder, see `Contract.factors`."""


class Contract(Totals):
    """Parameters, and what a variant decides about them.

    Args:
        d_in: width of the inputs.
        d_sae: number of latents.
        d_out: width of the targets, where they are not the inputs. A variant that gives it overrides `centre`, since
            `b_dec` is no longer a point among the inputs.

    Attributes:
        W_enc: (d_in, d_sae); `W_enc.t()` is contiguous.
        b_enc: (d_sae).
        W_dec: (d_sae, d_out); row i is the direction of latent i, unit norm.
        b_dec: (d_out).
    """

    # What a variant declares.

    Options: type[VariantOptions]  # a variant's own, which its constructor takes
    trains_on: Literal["all", "last"] = "all"  # rows of the store: all, or each context's last
    betas: tuple[float, float] | None = None  # overrides Adam's, where a paper does
    initialisation = "unit"  # see saes.initialisation
    apart: tuple[str, ...] = ()
    """Parameters that are clipped by themselves, with a learning rate that warms up from step `apart_from` on
    and does not decay."""
    has_unit_norm = True
    of_latents: tuple[str, ...] = ("W_enc", "b_enc", "W_dec")
    """Parameters and buffers with an entry for each latent, along the last dimension of `W_enc` and the
    first of the others."""
    is_signed = False  # whether latents may be negative; AuxK then chooses by size and keeps signs
    divides_latents = True  # whether its latents may be divided among ranks
    # Options of every variant, which `build` sets and `training` reads (orthogonality.py, alignment.py, usage.py).
    orthogonality_weight = 0.0
    orthogonality_chunk = 2
    aligned = False
    auxk_latents: Literal["dead", "underused"] = "dead"
    takes_own_targets = True
    """Targets may be other than inputs: `W_enc` alone reads inputs, so that `fold` can change their units."""

    # What it does not.

    positions = slice(0, None)  # of each context, those that it was trained on
    constants: tuple[str, ...] = ()  # buffers that no step changes
    forgets_latents = False  # whether `end_step` reads no dense latents but their counts
    origin = ""  # where it was trained, in words; of one that was loaded

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__()
        self.numbers: dict[str, Any] = {}  # see `Moving`
        self.copies: dict[tuple[str, torch.dtype], Tensor] = {}
        self.d_in, self.d_sae = d_in, d_sae
        self.d_out = d_in if d_out is None else d_out
        self.widened = 1  # times `most` that there is room for, once rows had more latents
        self.dead_room = 0  # dead latents that AuxK has room for on a GPU
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    # Before training.

    def initialise(self, batch: Batch | Tensor, generator: torch.Generator) -> None:
        """Set weights before the first step, from a batch of training rows; see `saes.initialisation`.

        Args:
            batch: as the SAE sees them; a tensor (B, d_in) of rows that are their own targets does too.
            generator: of all that is drawn.
        """
        initialise(self, self.initialisation, batch, generator)

    def take_probe(self, folder: Path, inputs: InputScale) -> None:
        """Take what a probe learned (`saeflow.complexity`), where the variant's options name one.

        Args:
            folder: of the fitted probe, which reads raw activations.
            inputs: what training sees of them.
        """

    # The nonlinearity.

    def condition(self, x: Tensor) -> Tensor | None:
        """(B,) what the variant decides from each input, with gradient; (B, d_in) where `activate` reads it whole."""
        return None

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        """Pre-activations (B, d_sae) to latents (B, d_sae)."""
        raise NotImplementedError

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents (B, d_sae) of scores of any precision, and what losses read of the same pass.

        Of a dense step on a GPU; a variant with such steps takes one pass for it (`operators.gpu.dense`).
        """
        return (self.activate(scores.to(self.W_dec.dtype), condition),)

    @property
    def is_sparse(self) -> bool:
        """Return whether a step is faster on the sparse path, since few latents are active."""
        return False

    @property
    def most(self) -> int:
        """Latents that a row is expected to use at most, where a GPU makes room for the same number in each."""
        return self.d_sae

    @property
    def reads_margin(self) -> bool:
        """Return whether `select` has a threshold; a choice by rank has none, and a margin need not be measured."""
        return True

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        """The entries of pre-activations (B, d_sae) that can be active; called without gradient.

        Args:
            margin: see `rounding`; 0.0 where pre-activations are exact. A rule with a threshold takes those
                above `lowered(threshold, margin)`, since `activate_selected` sees the exact ones.
        """
        raise NotImplementedError

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        """Selected pre-activations, with gradient, to latents: what `activate` makes of them."""
        return selected.relu()

    def activate_lists(
        self, selected: SparseLatents, condition: Tensor | None
    ) -> tuple[SparseLatents, tuple[Tensor, ...]]:
        """Return `activate_selected`, and what losses read of the same pass, as `activate_at_once` does.

        A variant takes one pass for it where rows have the same room (`operators.gpu.on_lists`).
        """
        return self.activate_selected(selected, condition), ()

    def decoded_beside(self, beside: tuple[Tensor, ...]) -> Tensor | None:
        """Return other values (R, C) of the latents' entries, given what `activate_lists` found beside latents.

        Their reconstruction, with the decoder as a constant, is then compared with the target too, see `errors_of_constant`.
        """
        return None

    # Losses, schedules and statistics.

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, each already weighted.

        Args:
            dead: (d_sae,) bool: latents that were silent for long; see `SAE.auxk`.
        """
        return {"reconstruction": self.reconstruction(fwd)}

    def reconstruction(self, fwd: Forward) -> Tensor:
        """Return the loss's term of the reconstruction error: the mean over rows of its square."""
        return self.mean_over_rows(fwd.squared_errors)

    def begin_step(self, step: int, total: int) -> None:
        """Set what schedules decide, before the step."""

    def apart_from(self, total: int) -> int:
        """The step from which the parameters `apart` learn."""
        return 0

    def end_step(self, fwd: Forward) -> None:
        """Update running statistics, after the step."""

    def facts(self, fwd: Forward) -> dict[str, float]:
        """Return what steps.csv records of the step besides losses: k, a threshold, a penalty."""
        return {}

    def dials(self) -> dict[str, object]:
        """All that the host decides of a step's kernels: while it is the same, they are.

        What is `Moving` is no part of it: kernels read that when they run.
        """
        kinds = (bool, int, float, str, type(None))
        named = {name: value for name, value in vars(self).items() if isinstance(value, kinds)}
        is_sparse = self.is_sparse  # read first, since `most` may follow from what it reads
        capacity = None if self.room is None else capacity_for(min(self.room, self.d_sae))
        return {**named, "is_sparse": is_sparse, "capacity": capacity}

    def settle(self) -> None:
        """Decide the path of the steps to come from what the last ones measured: a wait for the device."""

    def widen(self) -> None:
        """Make room for rows with more latents than the last step had."""
        self.widened *= 2

    def settle_dead(self, count: int) -> None:
        """Make room for so many dead latents and an eighth more, and not for many times as many."""
        part = max(16, capacity_for(count) // 8)
        needed = min(max(1, -(-9 * count // (8 * part))) * part, self.d_sae)
        if count > self.dead_room or 2 * needed <= self.dead_room:
            self.dead_room = needed

    def look_at_first(self, x: Tensor) -> None:
        """Decide the path of a step from its inputs (B, d_in), where no step before it has told."""

    # Encoder and decoder.

    @property
    def centre(self) -> Tensor:
        """(d_in,) what the encoder subtracts from activations."""
        return self.b_dec

    def factors(self, x: Tensor) -> Factors:
        """Return what the encoder multiplies: inputs (B, d_in), matrix (d_in, d_sae), bias (d_sae,), centre (d_in,)."""
        return x, self.W_enc, self.b_enc, self.centre

    def condition_and_factors(self, x: Tensor) -> tuple[Tensor | None, Factors]:
        """Return `condition` and `factors`, for a variant that finds both in one pass over its inputs."""
        return self.condition(x), self.factors(x)

    def rebuild(self, part: Tensor) -> Tensor:
        """(B, d_out) reconstruction from latents times `W_dec` of this process."""
        return self.sum_over_latents(part) + self.output_bias

    @property
    def adds_up(self) -> bool:
        """Return whether a reconstruction is the sum of latents times rows of `W_dec`, plus `b_dec`, and no more."""
        return type(self).rebuild is Contract.rebuild

    @property
    def prefixes(self) -> Tensor | None:
        """Return where each group of latents but the last ends (G - 1,), if prefixes of groups must reconstruct."""
        return None

    def decode_groups(self, latents: SparseLatents) -> Tensor | None:
        """(B, G, d_out) what each group of latents adds to `decode`, where a variant has groups."""
        return None

    # In use.

    def allowed_k(self, x: Tensor) -> Tensor | None:
        """(B,) how many latents each input may use, where a variant decides that by input."""
        return None

    def directions(self) -> Tensor:
        """(d_sae, d_out) what each latent adds to a reconstruction, per unit of activation."""
        return self.W_dec

    def readers(self) -> tuple[Tensor, Tensor]:
        """(d_in, d_sae) and (d_sae,): pre-activations are x - b_dec times the first, plus the second."""
        return self.W_enc, self.b_enc

    # From the units of training to those of the store.

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """From activations divided by `scale` to raw ones: latents and biases grow by it."""
        self.b_enc.mul_(scale)
        self.b_dec.mul_(scale)

    @torch.no_grad()
    def fold_shift(self, shift: Tensor) -> None:
        """From activations with (d_in,) `shift` taken away, in their own units, to activations with it."""
        self.b_dec.add_(shift)

    # Several processes, and a decoder that is not trained.

    def divided(self, first: int) -> None:
        """Adjust what counts latents of the whole dictionary: this process has those from `first` on."""

    def freeze_decoder(self) -> None:
        """Leave the decoder as it was initialised: the random-decoder baseline."""
        self.W_dec.requires_grad_(False)

    # For variants to call.

    @property
    def output_bias(self) -> Tensor:
        """Return `b_dec` for use beside sums over latents, so that its gradient is counted once."""
        return self.ranks.of_rows(self.b_dec)

    @property
    def room(self) -> int | None:
        """`most`, None where ranks divide latents: their selections need what each row has."""
        return self.most * self.widened if self.has_all_latents else None

    def moved(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A `Moving` attribute for kernels: on a GPU its copy there, (), elsewhere the number itself.

        Args:
            dtype: of the copy; None: the weights'.
        """
        if self.room is None or not acts_as_gpu(self.W_dec):
            return getattr(self, name)
        key = name, self.W_dec.dtype if dtype is None else dtype
        copy = self.copies.get(key)
        if copy is None or copy.device != self.W_dec.device:
            copy = self.W_dec.new_full((), getattr(self, name), dtype=key[1])
            self.copies[key] = copy
        return copy

    def above_zero(self, pre_acts: Tensor, margin: Tensor | float) -> SparseLatents:
        """Return the entries above 0, or within a margin of it: `select` of a variant whose latents are a relu."""
        return SparseLatents.from_above(pre_acts, -margin, self.room)

    def norm_weighted_error(self, fwd: Forward) -> Tensor:
        """() mean over rows and dimensions of (target - x_hat)^2 / ||target||, the Sparsemax release's."""
        norm = torch.linalg.vector_norm(fwd.target, dim=1, keepdim=True).clamp(min=1e-12)
        if fwd.errors is not None:
            return self.mean_over_rows(fwd.errors.squares / norm[:, 0] / self.d_out)
        return self.mean_over_rows(((fwd.target - fwd.x_hat).square() / norm).mean(1))
