"""The common class of sparse autoencoders: parameters, encoding, decoding, losses, unit-norm decoder.

A variant says how its latents are activated, on the dense path (`activate`) and, where few latents are
active, on the sparse one (`select`, `activate_selected`), and which losses it adds. Both paths give
equal values and gradients; the dense one is the reference. What a variant decides from each input
besides the pre-activations (its k, its norm) is the `condition`, worked out once for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saeflow.config.options import VariantOptions
from saeflow.errors import UserError
from saeflow.operators import (
    SparseLatents,
    acts_as_gpu,
    decode_sparse,
    gather_columns,
    gather_pre_acts,
    keep_topk,
    pre_acts,
    residual_share,
    room,
    rounding,
    select_auxk,
    squared_errors,
)
from saeflow.operators.gpu.lists import capacity_for
from saeflow.saes.initialisation import initialise
from saeflow.saes.input_scale import InputScale
from saeflow.saes.ranks import Ranks, check_divides

AUXK_DENSE_BELOW = 4
"""Dead latents per chosen one under which dense products over the dead are faster."""


class Errors(NamedTuple):
    """Errors of a reconstruction, where one pass over the latents found them with their gradients."""

    squares: (
        Tensor  # (B,) |x - x_hat|^2, with gradient; where a variant has groups, of all prefixes
    )
    residual: Tensor  # (B, d_in) x - x_hat, without gradient


@dataclass
class Forward:
    """One training pass over a batch."""

    x: Tensor  # (B, d_in)
    condition: Tensor | None  # (B,) what the variant decides from each input
    pre_acts: Tensor  # (B, d_sae); without gradient on the sparse path
    selected: (
        Tensor | SparseLatents
    )  # (B, d_sae) pre-activations with gradient, all or the selected
    latents: Tensor | SparseLatents  # (B, d_sae)
    rebuilt: Tensor | Callable[[], Tensor]  # x_hat, or what works it out if it is wanted
    parts: Tensor | None = (
        None  # (B, G, d_in) what each group of latents adds, where there are some
    )
    is_rounded: bool = False  # pre_acts are of a bfloat16 product
    errors: Errors | None = None  # where one pass gave them; then losses need no x_hat

    @cached_property
    def x_hat(self) -> Tensor:
        """Return the reconstruction (B, d_in), with gradient."""
        return self.rebuilt if isinstance(self.rebuilt, Tensor) else self.rebuilt()

    @property
    def squared_errors(self) -> Tensor:
        """Return |x - x_hat|^2 (B,), with gradient."""
        if self.errors is not None:
            return self.errors.squares
        return (self.x - self.x_hat).square().sum(1)

    @property
    def residual(self) -> Tensor:
        """Return x - x_hat (B, d_in), without gradient."""
        if self.errors is not None:
            return self.errors.residual
        return (self.x - self.x_hat).detach()

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.latents, SparseLatents)

    @property
    def values(self) -> Tensor:
        """Every latent that is stored: (count,) on the sparse path, (B, d_sae) on the dense one."""
        return self.latents.values if isinstance(self.latents, SparseLatents) else self.latents

    def forget_scores(self) -> None:
        """Free the pre-activations of the sparse path, which nothing needs once the loss is known."""
        if self.is_sparse:
            self.pre_acts = self.pre_acts.new_empty(0)

    def l0(self) -> Tensor:
        """(B,) number of non-zero latents."""
        if isinstance(self.latents, SparseLatents):
            return self.latents.l0()
        return (self.latents.detach() != 0).sum(1)

    def cut_rows(self) -> Tensor:
        """() number of rows that lost latents for want of room."""
        if isinstance(self.latents, SparseLatents):
            return self.latents.cut_rows()
        return torch.zeros((), dtype=torch.int64, device=self.x.device)

    def fired(self) -> Tensor:
        """(d_sae,) bool: latents that are not zero somewhere in the batch."""
        if isinstance(self.latents, SparseLatents):
            return self.latents.fired()
        return (self.latents.detach() != 0).any(0)


class SAE(nn.Module):
    """Base of every variant.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.

    Attributes:
        W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in; row i is the direction of latent i,
        unit norm), b_dec (d_in). `W_enc.t()` is contiguous.
    """

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
    positions = slice(0, None)  # of each context, those that it was trained on
    widened = 1  # times `most` that there is room for, once rows were cut
    divides_latents = True  # whether its latents may be divided among ranks
    ranks = Ranks()  # this process alone

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.numbers: dict[str, Any] = {}  # see `Moving`
        self.copies: dict[str, Tensor] = {}
        self.d_in, self.d_sae = d_in, d_sae
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Weights before the first step, from training rows x (B, d_in); see `saes.initialisation`."""
        initialise(self, self.initialisation, x, generator)

    @property
    def is_sparse(self) -> bool:
        """Return whether a step is faster on the sparse path, since few latents are active."""
        return False

    @property
    def most(self) -> int:
        """Latents that a row is expected to use at most, where a GPU makes room for the same number in each."""
        return self.d_sae

    @property
    def room(self) -> int | None:
        """`most`, None where ranks divide latents: their selections need what each row has."""
        return self.most * self.widened if self.ranks.of_latents == 1 else None

    def dials(self) -> dict[str, object]:
        """All that the host decides of a step's kernels: while it is the same, they are.

        What is `Moving` is no part of it: kernels read that when they run.
        """
        kinds = (bool, int, float, str, type(None))
        named = {name: value for name, value in vars(self).items() if isinstance(value, kinds)}
        is_sparse = self.is_sparse  # read first, since `most` may follow from what it reads
        capacity = None if self.room is None else capacity_for(min(self.room, self.d_sae))
        return {**named, "is_sparse": is_sparse, "capacity": capacity}

    def moved(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A `Moving` attribute for kernels: on a GPU its copy there, (), elsewhere the number itself.

        Args:
            dtype: of the copy; None: the weights'.
        """
        if self.room is None or not acts_as_gpu(self.W_dec):
            return getattr(self, name)
        copy = self.copies.get(name)
        if copy is None or copy.device != self.W_dec.device:
            copy = self.W_dec.new_full((), getattr(self, name), dtype=torch.float64)
            self.copies[name] = copy
        return copy.to(self.W_dec.dtype if dtype is None else dtype)

    def settle(self) -> None:
        """Decide the path of the steps to come from what the last ones measured: a wait for the device."""

    def take_probe(self, folder: Path, inputs: InputScale) -> None:
        """Take what a probe learned (`saeflow.complexity`), where the variant's options name one.

        Args:
            folder: of the fitted probe, which reads raw activations.
            inputs: what training sees of them.
        """

    # Using an SAE.

    @property
    def centre(self) -> Tensor:
        """(d_in,) what the encoder subtracts from activations."""
        return self.b_dec

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the encoder multiplies: inputs (B, d_in), matrix (d_in, d_sae), bias (d_sae,), centre (d_in,)."""
        return x, self.W_enc, self.b_enc, self.centre

    def latent_scores(self, x: Tensor) -> Tensor:
        """Return (inputs - centre) matrix + bias (B, d_sae) of `factors`, in the precision of the product."""
        return pre_acts(*self.factors(x))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return `latent_scores`, float32 also of bfloat16 products."""
        return self.latent_scores(x).to(self.W_dec.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_in) to latents (..., d_sae), dense."""
        flat = x.reshape(-1, self.d_in)
        latents = self.activate(self.pre_activations(flat), self.condition(flat))
        return latents.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., d_sae) to reconstruction (..., d_in)."""
        return self.rebuild(latents @ self.W_dec)

    def rebuild(self, part: Tensor) -> Tensor:
        """(B, d_in) reconstruction from what this rank's latents add to it."""
        return self.ranks.over_latents(part) + self.ranks.of_rows(self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct activations (..., d_in)."""
        return self.decode(self.encode(x))

    def allowed_k(self, x: Tensor) -> Tensor | None:
        """(B,) how many latents each input may use, where a variant decides that by input."""
        return None

    def directions(self) -> Tensor:
        """(d_sae, d_in) what each latent adds to a reconstruction, per unit of activation."""
        return self.W_dec

    def readers(self) -> tuple[Tensor, Tensor]:
        """(d_in, d_sae) and (d_sae,): pre-activations are x - b_dec times the first, plus the second."""
        return self.W_enc, self.b_enc

    # What a variant says.

    def condition(self, x: Tensor) -> Tensor | None:
        """(B,) what the variant decides from each input, with gradient."""
        return None

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        """Pre-activations (B, d_sae) to latents (B, d_sae)."""
        raise NotImplementedError

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
        return selected.with_values(selected.values.relu())

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, each already weighted."""
        return {"reconstruction": self.reconstruction(fwd)}

    def reconstruction(self, fwd: Forward) -> Tensor:
        """Return the loss's term of the reconstruction error: the mean over rows of its square."""
        return self.ranks.batch_mean(fwd.squared_errors)

    def norm_weighted_error(self, fwd: Forward) -> Tensor:
        """() mean over rows and dimensions of (x - x_hat)^2 / ||x||, the Sparsemax release's."""
        norm = torch.linalg.vector_norm(fwd.x, dim=1, keepdim=True).clamp(min=1e-12)
        if fwd.errors is not None:
            return self.ranks.batch_mean(fwd.errors.squares / norm[:, 0] / self.d_in)
        return self.ranks.batch_mean(((fwd.x - fwd.x_hat).square() / norm).mean(1))

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

    # Training.

    def join(self, ranks: Ranks) -> None:
        """Become one rank's part of the SAE, which was whole until now.

        Raises:
            UserError: the variant's latents cannot be divided, or not evenly.
        """
        self.ranks = ranks
        if ranks.of_latents == 1:
            return
        self.check_divisible()
        check_divides("d_sae", self.d_sae, ranks, "latents")
        self.d_sae //= ranks.size
        for name in self.of_latents:
            whole = getattr(self, name)
            part = self.part_of(name, whole.detach())
            setattr(self, name, nn.Parameter(part) if isinstance(whole, nn.Parameter) else part)

    def check_divisible(self) -> None:
        """Refuse to divide latents among ranks where each row's selection needs all of its scores.

        Raises:
            UserError: it does.
        """
        if not self.divides_latents:
            raise UserError(
                f"runtime.ranks.split: latents of {type(self).__name__} cannot be divided among ranks: each "
                "row's selection needs all of its scores. Set it to batch."
            )

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter, or of what is laid out as one, in the layout of a parameter."""
        if self.ranks.of_latents == 1 or name not in self.of_latents:
            return whole
        begin = self.ranks.rank * self.d_sae
        if name == "W_enc":
            return whole[:, begin : begin + self.d_sae].t().clone().t()
        return whole[begin : begin + self.d_sae].clone()

    def whole_of(self, name: str, part: Tensor) -> Tensor:
        """The parameter, or what is laid out as one, that this rank has a part of."""
        if self.ranks.of_latents == 1 or name not in self.of_latents:
            return part
        return torch.cat(self.ranks.gather(part), dim=1 if name == "W_enc" else 0)

    def run(self, x: Tensor, *, is_sparse: bool | None = None) -> Forward:
        """A pass that can be differentiated, on the variant's own path unless told otherwise.

        Args:
            x: (B, d_in).
            is_sparse: carry latents as (indices, values) and build no dense (B, d_sae) gradient;
                False: the plain dense path.
        """
        condition = self.condition(x)
        if not (self.is_sparse if is_sparse is None else is_sparse):
            pre_acts = self.pre_activations(x)
            latents = self.activate(pre_acts, condition)
            return Forward(x, condition, pre_acts, pre_acts, latents, self.decode(latents))
        with torch.no_grad():
            has_room = room(x, self.room) is not None  # then selections read bfloat16 as it is
            pre_acts = self.latent_scores(x) if has_room else self.pre_activations(x)
            is_rounded = torch.is_autocast_enabled(x.device.type)
            margin = self.margin(x) if is_rounded else 0.0
            chosen = self.select(pre_acts, condition, margin)
        selected = self.gather(x, chosen, is_rounded)
        active = self.activate_selected(selected, condition)
        parts = None
        if (errors := self.errors_of(x, active)) is not None:
            x_hat: Tensor | Callable[[], Tensor] = partial(self.decode_selected, active)
        elif (parts := self.decode_groups(active)) is not None:
            x_hat = parts.sum(1) + self.b_dec
        else:
            x_hat = self.decode_selected(active)
        return Forward(x, condition, pre_acts, selected, active, x_hat, parts, is_rounded, errors)

    @property
    def adds_up(self) -> bool:
        """Return whether a reconstruction is the sum of latents times rows of `W_dec`, plus `b_dec`, and no more."""
        plain = SAE.decode_selected, SAE.rebuild
        return (type(self).decode_selected, type(self).rebuild) == plain

    @property
    def prefixes(self) -> Tensor | None:
        """Return where each group of latents but the last ends (G - 1,), if prefixes of groups must reconstruct."""
        return None

    def errors_of(self, x: Tensor, latents: SparseLatents) -> Errors | None:
        """Return the errors of the reconstruction of x (B, d_in), where one pass finds them with their gradients."""
        if latents.lists is None or not self.adds_up:
            return None
        squares, error = squared_errors(latents, self.W_dec, self.b_dec, x, self.prefixes)
        return Errors(squares, -error)

    def errors_of_constant(self, x: Tensor, latents: SparseLatents) -> Tensor:
        """Return squared errors (B,) of another reconstruction of x (B, d_in), with the decoder as a constant."""
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        if latents.lists is not None:
            return squared_errors(latents, W_dec, b_dec, x)[0]
        x_hat = self.ranks.over_latents(decode_sparse(latents, W_dec)) + b_dec
        return (x - x_hat).square().sum(1)

    def margin(self, x: Tensor) -> Tensor:
        """() how far `pre_activations(x)` of lower precision may lie from exact ones."""
        inputs, matrix, _, centre = self.factors(x)
        return rounding(inputs - centre, matrix)

    def gather(
        self,
        x: Tensor,
        chosen: SparseLatents,
        is_rounded: bool,
        beside: SparseLatents | None = None,
    ) -> SparseLatents:
        """Entries chosen from `pre_activations(x)`, with gradient; exact, also where those are rounded.

        Args:
            beside: entries of the same step that were gathered before.
        """
        return gather_pre_acts(
            *self.factors(x), chosen, is_rounded=is_rounded, W_dec=self.W_dec, beside=beside
        )

    def gather_columns(self, fwd: Forward, columns: Tensor) -> Tensor:
        """Whole columns (n,) of exact pre-activations, (B, n), with gradient."""
        known = None if fwd.is_rounded else fwd.pre_acts
        return gather_columns(fwd.x, self.W_enc, self.b_enc, self.centre, known, columns)

    def decode_selected(self, latents: SparseLatents) -> Tensor:
        """`decode`, of latents on the sparse path."""
        return self.rebuild(decode_sparse(latents, self.W_dec))

    def decode_groups(self, latents: SparseLatents) -> Tensor | None:
        """(B, G, d_in) what each group of latents adds to `decode`, where a variant has groups."""
        return None

    def auxk(self, fwd: Forward, dead: Tensor) -> Tensor:
        """Return the loss of dead latents (d_sae,) that reconstruct the residual (Gao et al. 2024)."""
        residual, k_aux = fwd.residual, self.d_in // 2
        if self.ranks.of_latents == 1 and room(fwd.pre_acts, k_aux) is not None:
            chosen = select_auxk(fwd.pre_acts.detach(), dead, k_aux, k_aux)
            beside = fwd.selected if isinstance(fwd.selected, SparseLatents) else None
            chosen = self.gather(fwd.x, chosen, fwd.is_rounded, beside)
            e_hat = decode_sparse(chosen.relu(), self.W_dec)
            share = residual_share(residual, e_hat, self.ranks.over_batch)
            return share.where(dead.any(), 0)
        columns = dead.nonzero()[:, 0]
        if int(self.ranks.over_latents(residual.new_tensor(len(columns)))) == 0:
            return residual.new_zeros(())
        if self.ranks.of_latents == 1 and len(columns) <= AUXK_DENSE_BELOW * k_aux:
            if fwd.is_sparse:
                acts = self.gather_columns(fwd, columns)
            else:
                acts = fwd.pre_acts.index_select(1, columns)
            active = acts.relu()
            if len(columns) > k_aux:
                active = keep_topk(active, k_aux)
            e_hat = active @ self.W_dec.index_select(0, columns)
        else:
            chosen = select_auxk(fwd.pre_acts.detach(), dead, k_aux)
            chosen = self.ranks.largest_of_rows(chosen, k_aux)
            chosen = (
                self.gather(fwd.x, chosen, fwd.is_rounded)
                if fwd.is_sparse
                else chosen.taken_from(fwd.pre_acts)
            )
            e_hat = self.ranks.over_latents(decode_sparse(chosen, self.W_dec))
        return residual_share(residual, e_hat, self.ranks.over_batch)

    def freeze_decoder(self) -> None:
        """Leave the decoder as it was initialised: the random-decoder baseline."""
        self.W_dec.requires_grad_(False)

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove the part of the decoder's gradient along each row."""
        if self.has_unit_norm and self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """From inputs divided by `scale` to raw ones: latents and biases grow by it."""
        self.b_enc.mul_(scale)
        self.b_dec.mul_(scale)

    @torch.no_grad()
    def fold_shift(self, shift: Tensor) -> None:
        """From inputs with (d_in,) `shift` taken away, in their own units, to inputs with it."""
        self.b_dec.add_(shift)
