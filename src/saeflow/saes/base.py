"""The class of sparse autoencoders that every variant derives from, in three parts.

`saes.use` has what a user of an SAE calls, `saes.contract` what a variant overrides, and this file what the trainer
calls: a pass that can be differentiated, AuxK, the projection of gradients, the division of latents among ranks, and
the way back to raw activations.

A pass has two paths. The dense one is the reference; the sparse one, where few latents are active, carries them as
(indices, values) and gives equal values and gradients.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.operators import (
    SparseLatents,
    acts_as_gpu,
    decode_sparse,
    gather_columns,
    gather_pre_acts,
    keep_topk,
    pre_acts,
    rebuild,
    residual_share,
    room,
    rounding,
    select_auxk,
    share_left,
    squared_errors,
)
from saeflow.operators.gpu.dead import MOST_DEAD, columns_of, largest
from saeflow.operators.gpu.dense_errors import squared_errors as dense_squared_errors
from saeflow.operators.gpu.pairs import squared_errors_of_two
from saeflow.operators.gpu.shadows import multiplies_in_bf16, shadow
from saeflow.saes.contract import Factors
from saeflow.saes.forward import Errors, Forward
from saeflow.saes.input_scale import InputScale
from saeflow.saes.ranks import Ranks, check_divides
from saeflow.saes.use import Usable

AUXK_DENSE_BELOW = 4
"""Dead latents per chosen one under which dense products over the dead are faster."""


class SAE(Usable):
    """Base of every variant; see `Contract` for its arguments and attributes."""

    # A pass.

    def run(self, batch: Batch, *, is_sparse: bool | None = None) -> Forward:
        """A pass that can be differentiated, on the variant's own path unless told otherwise.

        Args:
            batch: inputs (B, d_in) and targets (B, d_out).
            is_sparse: carry latents as (indices, values) and build no dense (B, d_sae) gradient;
                False: the plain dense path.
        """
        x = batch.x
        if is_sparse is None:
            self.look_at_first(x)
        if not (self.is_sparse if is_sparse is None else is_sparse):
            return self.run_dense(batch, self.condition(x))
        condition, factors = self.condition_and_factors(x)
        with torch.no_grad():
            scores = pre_acts(*factors)
            if room(x, self.room) is None:  # else selections read bfloat16 as it is
                scores = scores.to(self.W_dec.dtype)
            is_rounded = torch.is_autocast_enabled(x.device.type)
            margin = self.margin(factors, is_rounded=is_rounded)
            chosen = self.select(scores, condition, margin)
        selected = self.gather(factors, chosen, is_rounded)
        active, beside = self.activate_lists(selected, condition)
        parts = None
        errors = self.errors_of(batch.target, active, self.decoded_beside(beside))
        if errors is not None:
            x_hat: Tensor | Callable[[], Tensor] = partial(self.decode_selected, active)
        elif (parts := self.decode_groups(active)) is not None:
            x_hat = parts.sum(1) + self.b_dec
        else:
            x_hat = self.decode_selected(active)
        return Forward(
            batch, condition, scores, selected, active, x_hat, parts, is_rounded, errors, beside
        )

    def run_dense(self, batch: Batch, condition: Tensor | None) -> Forward:
        """Return the plain pass, in which every latent is stored."""
        if not acts_as_gpu(self.W_dec):
            exact = self.pre_activations(batch.x)
            latents = self.activate(exact, condition)
            return Forward(batch, condition, exact, exact, latents, self.decode(latents))
        scores = self.latent_scores(batch.x)
        latents, *beside = self.activate_at_once(scores, condition)
        if (errors := self.errors_of(batch.target, latents)) is not None:
            x_hat: Tensor | Callable[[], Tensor] = partial(self.decode_exactly, latents)
        else:
            x_hat = self.decode(latents).to(self.W_dec.dtype)
        fwd = Forward(batch, condition, scores, scores, latents, x_hat, errors=errors)
        fwd.is_rounded = torch.is_autocast_enabled(batch.x.device.type)
        fwd.beside = tuple(beside)
        return fwd

    def errors_of(
        self, target: Tensor, latents: SparseLatents | Tensor, others: Tensor | None = None
    ) -> Errors | None:
        """Return the errors of the reconstruction of a target (B, d_out), where one pass finds them with their gradients.

        Args:
            others: values of the same entries, see `decoded_beside`.
        """
        if not self.adds_up:
            return None
        if isinstance(latents, Tensor):
            if self.prefixes is not None or not self.has_all_latents:
                return None
            lower = shadow(self.W_dec) if multiplies_in_bf16(latents) else None
            return Errors(*dense_squared_errors(latents, self.W_dec, self.b_dec, target, lower))
        if latents.lists is None:
            return None
        if others is not None and latents.walk is not None and not target.requires_grad:
            of_lists = latents.lists, others, self.W_dec, self.b_dec, target, latents.walk
            return Errors(*squared_errors_of_two(*of_lists))
        return Errors(*squared_errors(latents, self.W_dec, self.b_dec, target, self.prefixes))

    def errors_of_constant(self, fwd: Forward, latents: SparseLatents) -> Tensor:
        """Return squared errors (B,) of another reconstruction of a pass's target, with the decoder as a constant."""
        if fwd.errors is not None and fwd.errors.of_constant is not None:
            return fwd.errors.of_constant
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        if latents.lists is not None:
            lower = shadow(self.W_dec) if fwd.is_rounded else None
            return squared_errors(latents, W_dec, b_dec, fwd.target, lower=lower)[0]
        x_hat = self.sum_over_latents(decode_sparse(latents, W_dec)) + b_dec
        return (fwd.target - x_hat).square().sum(1)

    def margin(self, factors: Factors, *, is_rounded: bool) -> Tensor | float:
        """() how far pre-activations of these `factors` may lie from exact ones; 0.0 where they are exact, or `select` does not ask."""
        if not (is_rounded and self.reads_margin):
            return 0.0
        inputs, matrix, _, centre = factors
        return rounding(inputs, centre, matrix)

    def gather(
        self,
        factors: Factors,
        chosen: SparseLatents,
        is_rounded: bool,
        beside: SparseLatents | None = None,
    ) -> SparseLatents:
        """Entries chosen from the pre-activations of `factors`, with gradient; exact, also where those are rounded.

        Args:
            beside: entries of the same step that were gathered before.
        """
        W_dec = self.W_dec if self.d_out == self.d_in else None
        return gather_pre_acts(*factors, chosen, is_rounded=is_rounded, W_dec=W_dec, beside=beside)

    def gather_columns(self, fwd: Forward, columns: Tensor) -> Tensor:
        """Whole columns (n,) of exact pre-activations, (B, n), with gradient."""
        known = None if fwd.is_rounded else fwd.pre_acts
        return gather_columns(fwd.x, self.W_enc, self.b_enc, self.centre, known, columns)

    def decode_exactly(self, latents: Tensor) -> Tensor:
        """`decode`, of latents (B, d_sae) of any precision, in that of the weights."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.decode(latents.to(self.W_dec.dtype))

    def decode_selected(self, latents: SparseLatents) -> Tensor:
        """`decode`, of latents on the sparse path."""
        return self.rebuild(decode_sparse(latents, self.W_dec))

    def auxk(self, fwd: Forward, dead: Tensor) -> Tensor:
        """Return the loss of dead latents (d_sae,) that reconstruct the residual (Gao et al. 2024)."""
        k_aux = self.d_out // 2
        if self.has_all_latents and room(fwd.pre_acts, k_aux) is not None:
            return self.auxk_at_once(fwd, dead, k_aux)
        residual = fwd.residual
        columns = dead.nonzero()[:, 0]
        if int(self.sum_over_latents(residual.new_tensor(len(columns)))) == 0:
            return residual.new_zeros(())
        if self.has_all_latents and len(columns) <= AUXK_DENSE_BELOW * k_aux:
            if fwd.is_sparse:
                acts = self.gather_columns(fwd, columns)
            else:
                acts = fwd.pre_acts.index_select(1, columns)
            sizes = self.ranked(acts).relu()
            if len(columns) > k_aux:
                sizes = keep_topk(sizes, k_aux)
            e_hat = self.with_signs(sizes, acts) @ self.W_dec.index_select(0, columns)
        else:
            chosen = select_auxk(self.ranked(fwd.pre_acts.detach()), dead, k_aux)
            chosen = self.largest_of_rows(chosen, k_aux)
            chosen = chosen.at(fwd.pre_acts) if self.is_signed else chosen
            chosen = (
                self.gather(self.factors(fwd.x), chosen, fwd.is_rounded)
                if fwd.is_sparse
                else chosen.taken_from(fwd.pre_acts)
            )
            e_hat = self.sum_over_latents(decode_sparse(chosen, self.W_dec))
        return residual_share(residual, e_hat, self.sum_over_rows)

    def auxk_at_once(self, fwd: Forward, dead: Tensor, k_aux: int) -> Tensor:
        """Return the same without a value read by the host, which knows how many are dead from lines of the log.

        Latents are chosen from the scores as they are, and products are with the rows of the dead alone, copied, in the
        scores' precision; where the dead are most of all, with the chosen entries.
        """
        if self.dead_room == 0:
            fwd.dead = dead.sum()
            return self.W_dec.new_zeros(())
        if 2 * self.dead_room > self.d_sae or self.dead_room > MOST_DEAD:
            number = dead.sum()
            fwd.dead = number.new_zeros(())  # lists have room for the chosen ones of any number
            e_hat = self.rebuilt_on_lists(fwd, dead, k_aux)
        else:
            columns, number, fwd.dead = columns_of(dead, self.dead_room)
            active = largest(fwd.pre_acts, columns, number, k_aux, is_signed=self.is_signed)
            walk = fwd.selected.walk if isinstance(fwd.selected, SparseLatents) else None
            e_hat = rebuild(*self.factors(fwd.x), self.W_dec, active, columns, walk)
        error = -fwd.residual if fwd.errors is None else fwd.errors.error
        return share_left(error, e_hat, number, self.sum_over_rows, self.rows(fwd.x))

    def rebuilt_on_lists(self, fwd: Forward, dead: Tensor, k_aux: int) -> Tensor:
        """Return what the k_aux largest dead latents of each row add up to (B, d_out), from lists of them."""
        chosen = select_auxk(self.ranked(fwd.pre_acts.detach()), dead, k_aux, k_aux)
        chosen = chosen.at(fwd.pre_acts) if self.is_signed else chosen
        beside = fwd.selected if isinstance(fwd.selected, SparseLatents) else None
        chosen = self.gather(self.factors(fwd.x), chosen, fwd.is_rounded, beside)
        return decode_sparse(chosen if self.is_signed else chosen.relu(), self.W_dec)

    def ranked(self, acts: Tensor) -> Tensor:
        """Return what AuxK ranks pre-activations by; those that are not above 0 reconstruct nothing."""
        return acts.abs() if self.is_signed else acts

    def with_signs(self, sizes: Tensor, acts: Tensor) -> Tensor:
        """Return sizes of pre-activations with the signs that these have."""
        return sizes * acts.detach().sign() if self.is_signed else sizes

    @torch.no_grad()
    def project_grad(self) -> None:
        """Remove the part of the decoder's gradient along each row."""
        if self.has_unit_norm and self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    # Latents among ranks.

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
        self.divided(ranks.rank * self.d_sae)

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

    # The end of training.

    @torch.no_grad()
    def fold(self, inputs: InputScale, targets: InputScale) -> None:
        """From scaled inputs and targets to raw ones.

        Args:
            inputs: scale and shift that the encoder's activations had.
            targets: those of the decoder's; the same object where inputs are the targets.
        """
        if targets is inputs:
            self.fold_scale(inputs.scale)
            if inputs.shift is not None:
                self.fold_shift(inputs.shift)
            return
        # Latents get the unit of the targets, so that decoder rows keep their norm; W_enc changes units.
        centre = self.centre * inputs.scale
        if inputs.shift is not None:
            centre = centre + inputs.shift
        self.fold_scale(targets.scale)
        self.W_enc.mul_(targets.scale / inputs.scale)
        if targets.shift is not None:
            self.b_dec.add_(targets.shift)
        self.b_enc.add_((self.centre - centre) @ self.W_enc)
