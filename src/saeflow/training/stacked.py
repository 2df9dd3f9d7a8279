"""Runs of one group whose SAEs have the same shape, stepped together on a GPU.

Their weights lie in one block of memory, so that the encoder's products of all are one batched product, and chosen
entries of all are gathered and decoded as one list, whose columns are counted through. What a variant says
(selection, activation, losses, statistics) and the update stay each SAE's own. So every SAE gets what a step of its
own gives it, within the order of float32 sums.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saeflow.batch import Batch
from saeflow.operators import (
    SparseLatents,
    acts_as_gpu,
    decode_sparse,
    gather_pre_acts,
    squared_errors,
)
from saeflow.operators.gpu.lists import Lists, Spill
from saeflow.saes import SAE, Forward
from saeflow.saes.forward import Errors
from saeflow.training.clock import running
from saeflow.training.graphs import Replayed, capture_cuda
from saeflow.training.run import Run, Stepped

MOST_LATENTS = 1 << 16
"""Latents of a stack: beyond them one SAE alone keeps a GPU busy, and scores of all of them cost memory."""
SHARED = (
    "gather",
    "decode_selected",
    "decode_groups",
    "pre_activations",
    "factors",
    "latent_scores",
    "margin",
    "centre",
)
"""Methods that a variant must have from `SAE` for its products to be taken together with others'."""


class Stack:
    """Runs that take their steps together.

    Args:
        runs: at least two, of SAEs of one variant and shape, on one device, at the same step of the same length.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        saes = [run.sae for run in runs]
        for run in runs:
            run.clocks = [each.clock for each in runs]
        shape = (len(saes), saes[0].d_sae, saes[0].d_in)
        self.W_enc, self.W_dec = (saes[0].W_dec.new_empty(shape) for _ in range(2))
        self.b_enc = saes[0].b_enc.new_empty(shape[:2])
        with torch.no_grad():
            for number, sae in enumerate(saes):
                for own, part in (
                    (sae.W_enc, self.W_enc[number].t()),
                    (sae.W_dec, self.W_dec[number]),
                    (sae.b_enc, self.b_enc[number]),
                ):
                    part.copy_(own)
                    own.data = part
        self.replayed: Replayed[list[Stepped]] | None = None
        if saes[0].W_dec.is_cuda:
            self.replayed = Replayed(self.work, capture_cuda)

    @property
    def step(self) -> int:
        return self.runs[0].step

    @property
    def total(self) -> int:
        return self.runs[0].total

    def take(self, batch: Batch, waited: float) -> None:
        """The next step of every run, of their raw batch; each counts an equal share of the time."""
        for run in self.runs:
            run.clock.waited(waited)
            run.begin()
        with running(self.runs[0].clocks):
            found = self.work(batch) if self.replayed is None else self.replayed(batch, self.key())
        for run, stepped in zip(self.runs, found, strict=True):
            run.end(stepped, batch)

    def key(self) -> Hashable:
        """All that the host decides of a step's kernels."""
        return tuple(tuple(run.sae.dials().items()) for run in self.runs)

    def work(self, batch: Batch) -> list[Stepped]:
        """A step of all without what the host decides of it, of their raw batch."""
        batches = [run.scaled(batch) for run in self.runs]
        if not all(run.sae.is_sparse for run in self.runs):  # dense steps have nothing to gather
            return [run.work(own) for run, own in zip(self.runs, batches, strict=True)]
        for run in self.runs:
            run.optimizer.zero_grad()
        W_enc, b_enc, W_dec = (part.requires_grad_() for part in self.weights())
        with self.runs[0].autocast():
            forwards = self.forward(batches, W_enc, b_enc, W_dec)
        losses = [run.judge(fwd) for run, fwd in zip(self.runs, forwards, strict=True)]
        for fwd in forwards:
            fwd.forget_scores()
        torch.stack([terms["loss"] for terms in losses]).sum().backward()
        grads = [part.grad for part in (W_enc, b_enc, W_dec)]
        for number, run in enumerate(self.runs):
            give(run.sae, *(None if grad is None else grad[number] for grad in grads))
        steps = zip(self.runs, forwards, losses, strict=True)
        return [run.learn(fwd, terms) for run, fwd, terms in steps]

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d_sae, d_in) W_enc by rows, (n, d_sae) b_enc and (n, d_sae, d_in) W_dec of all, which share memory."""
        return self.W_enc.detach(), self.b_enc.detach(), self.W_dec.detach()

    def forward(
        self, batches: Sequence[Batch], W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
    ) -> list[Forward]:
        """A pass of each SAE over its batch of B rows, with gradients at `weights`."""
        inputs = [batch.x for batch in batches]
        saes, n_rows, d_in = [run.sae for run in self.runs], len(inputs[0]), W_enc.shape[2]
        pairs = list(zip(saes, inputs, strict=True))
        conditions = [sae.condition(x) for sae, x in pairs]
        with torch.no_grad():
            centred = torch.stack([x - sae.centre for sae, x in pairs])
            scores = torch.baddbmm(b_enc[:, None], centred, W_enc.transpose(1, 2))
            is_rounded = torch.is_autocast_enabled(centred.device.type)
            margins = [sae.margin(sae.factors(x), is_rounded=is_rounded) for sae, x in pairs]
            to_choose = zip(saes, scores, conditions, margins, strict=True)
            chosen = [
                sae.select(own, condition, margin) for sae, own, condition, margin in to_choose
            ]
        room, decoder = max(own.capacity for own in map(lists_of, chosen)), W_dec.view(-1, d_in)
        gathered = gather_pre_acts(
            centred.view(-1, d_in), W_enc.view(-1, d_in).t(), b_enc.view(-1), W_enc.new_zeros(d_in),
            joined([lists_of(own) for own in chosen], room), is_rounded=is_rounded, W_dec=decoder,
        )  # fmt: skip
        of_each = apart(gathered.values.view(-1, room), len(saes), n_rows)
        selected = [
            own.with_whole(values[:, : lists_of(own).capacity].reshape(-1))
            for own, values in zip(chosen, of_each, strict=True)
        ]
        to_activate = zip(saes, selected, conditions, strict=True)
        active = [sae.activate_selected(own, condition) for sae, own, condition in to_activate]
        values = together([widened(lists_of(own).values, room) for own in active], n_rows)
        of_all = gathered.with_whole(values.view(-1))
        targets = [batch.target for batch in batches]
        errors: Sequence[Errors | None] = [None] * len(saes)
        if saes[0].adds_up:
            errors = errors_of(of_all, decoder, [sae.b_dec for sae in saes], targets)
            x_hats: list[Any] = [
                partial(sae.decode_selected, own) for sae, own in zip(saes, active, strict=True)
            ]
        else:
            parts = decode_sparse(of_all, decoder).view(len(saes), n_rows, d_in)
            x_hats = [sae.rebuild(part) for sae, part in zip(saes, parts, strict=True)]
        found = zip(batches, conditions, scores, selected, active, x_hats, strict=True)
        fired = of_all.fired().chunk(len(saes))
        return [
            replace(Forward(*one), is_rounded=is_rounded, errors=error, has_fired=has_fired)
            for one, error, has_fired in zip(found, errors, fired, strict=True)
        ]


def errors_of(
    latents: SparseLatents, W_dec: Tensor, b_decs: Sequence[Tensor], targets: Sequence[Tensor]
) -> list[Errors]:
    """Errors of each SAE's reconstruction of its target, with gradient; latents and W_dec are those of all."""
    b_dec, target = torch.stack(list(b_decs)), torch.cat(list(targets))
    squares, error = squared_errors(latents, W_dec, b_dec, target)
    pairs = zip(squares.view(len(b_decs), -1).unbind(), error.chunk(len(b_decs)), strict=True)
    return [Errors(*pair) for pair in pairs]


def give(sae: SAE, W_enc: Tensor | None, b_enc: Tensor | None, W_dec: Tensor | None) -> None:
    """Add gradients (d_sae, d_in), (d_sae,) and (d_sae, d_in) to those that an SAE's own products gave its weights.

    The encoder has none while the variant takes its scores as constants.
    """
    of_W_enc = None if W_enc is None else W_enc.t()
    of_centre = None if b_enc is None else -(sae.W_enc.detach() @ b_enc)  # through x - b_dec
    found = ((sae.W_enc, of_W_enc), (sae.b_enc, b_enc), (sae.W_dec, W_dec), (sae.b_dec, of_centre))
    for parameter, gradient in found:
        if gradient is not None and parameter.requires_grad:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def lists_of(latents: SparseLatents) -> Lists:
    """The rectangles of entries on a GPU."""
    assert latents.lists is not None
    return latents.lists


def widened(entries: Tensor, room: int) -> Tensor:
    """(B, C) to (B, room), with zeros."""
    return pad(entries, (0, room - entries.shape[1]))


def together(of_lists: Sequence[Tensor], n_rows: int) -> Tensor:
    """Join entries of the lists of each, (B, ...) and those of spare lists, to those of all: spare lists come last."""
    own, spare = ([of[at] for of in of_lists] for at in (slice(n_rows), slice(n_rows, None)))
    return torch.cat([*own, *spare])


def apart(of_all: Tensor, count: int, n_rows: int) -> list[Tensor]:
    """The reverse of `together`."""
    own, spare = of_all[: count * n_rows], of_all[count * n_rows :]
    parts = zip(own.chunk(count), spare.view(count, -1, *spare.shape[1:]), strict=True)
    return [torch.cat(pair) for pair in parts]


def joined(lists: Sequence[Lists], room: int) -> SparseLatents:
    """Lists of (B, d_sae) each as those of (n B, n d_sae): the columns of one after those of the one before."""
    n_rows, number = len(lists[0].status), range(len(lists))
    columns = [
        widened((own.columns + n * own.d_sae).where(own.real, 0), room)
        for n, own in zip(number, lists, strict=True)
    ]
    values, counts = [widened(own.values, room) for own in lists], [own.counts for own in lists]
    spills = [own.spill for own in lists if own.spill is not None]
    spill = None
    if spills:
        spare = len(counts[0]) - n_rows
        begin = n_rows * len(lists)  # of the spare lists of all
        owners = [of.owners + n * n_rows for n, of in zip(number, spills, strict=True)]
        first = [
            of.first - n_rows + begin + n * spare for n, of in zip(number, spills, strict=True)
        ]
        parts = torch.cat([of.parts for of in spills])
        spill = Spill(together(owners, n_rows), torch.cat(first), parts)
    status, d_sae = torch.cat([own.status for own in lists]), sum(own.d_sae for own in lists)
    entries = together(columns, n_rows), together(values, n_rows)
    return SparseLatents.of(Lists(*entries, together(counts, n_rows), status, d_sae, spill))


def units(runs: Sequence[Run]) -> list[Run | Stack]:
    """Runs that share their batches, those that can step together as stacks."""
    alike: dict[Hashable, list[Run]] = {}
    for number, run in enumerate(runs):
        alike.setdefault(shape_of(run) or number, []).append(run)
    found: list[Run | Stack] = []
    for group in alike.values():
        most = max(1, MOST_LATENTS // group[0].sae.d_sae)
        for start in range(0, len(group), most):
            part = group[start : start + most]
            found.append(Stack(part) if len(part) > 1 else part[0])
    return found


def shape_of(run: Run) -> Hashable:
    """All in which runs of a stack agree; None: a run that steps by itself."""
    sae = run.sae
    is_plain = sae.b_dec is not None and sae.d_out == sae.d_in
    is_shared = all(getattr(type(sae), name) is getattr(SAE, name) for name in SHARED)
    if not (is_shared and acts_as_gpu(sae.W_dec) and run.ranks.size == 1 and is_plain):
        return None
    return type(sae), sae.d_in, sae.d_sae, run.step, run.total
