"""Adam for SAEs: gradients projected, the whole clipped, unit decoder rows after the step.

Two passes over the weights do all of it, one that measures and one that updates. It is no `torch.optim.Optimizer`,
whose first call imports torch's compiler: 2 s and 150 MiB of every training process, for nothing that is used here.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.config import TrainingConfig
from saeflow.operators import acts_as_gpu, native
from saeflow.operators.gpu import shadows
from saeflow.operators.gpu.update import Part, measure, update
from saeflow.saes import SAE
from saeflow.training.alignment import Alignment

EPSILON = 1e-8


class Optimizer:
    """Adam over what an SAE trains.

    Args:
        sae: on its device, with `requires_grad` settled.
        config: its betas, where the variant has none of its own, and the largest gradient norm.

    Attributes:
        param_groups: params, lr, the lr that the device was told, betas and eps; the first holds what is clipped together, the second, where
            there is one, what the variant sets apart.
        state: of each parameter, laid out alike: its moments exp_avg and exp_avg_sq, and (), the steps in
            which it had a gradient, a view of the group's `steps`. They are made before the first step, so that on a CPU what a step needs and
            frees is one block of memory, which the next step finds whole.
    """

    def __init__(self, sae: SAE, config: TrainingConfig) -> None:
        trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        apart = [trained.pop(name) for name in sae.apart]
        groups = [list(trained.values()), *([apart] if apart else [])]
        settings = {"lr": 0.0, "told": 0.0, "betas": sae.betas or config.betas, "eps": EPSILON}
        self.param_groups: list[dict[str, Any]] = [{"params": g, **settings} for g in groups]
        device = sae.W_dec.device
        self.steps = [torch.zeros(len(group), device=device) for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for group, steps in zip(groups, self.steps, strict=True)
            for parameter, step in zip(group, steps.unbind(), strict=True)
        }
        self.sae = sae
        self.alignment = Alignment(sae) if sae.aligned else None
        self.largest_norm = math.inf if config.grad_clip is None else config.grad_clip
        self.rates = torch.zeros(len(groups), device=device).unbind()  # of each group

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def tell_rates(self) -> None:
        """Put each group's learning rate on the device, and what others changed in copies of weights."""
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            if group["lr"] != group["told"]:
                rate.fill_(group["lr"])
                group["told"] = group["lr"]
            for parameter in group["params"]:
                shadows.refresh(parameter)

    def measure(self) -> list[Tensor]:
        """Remove the parts of gradients that would leave a constraint; the norm () of each group's gradient.

        A norm is not finite where any gradient of its group is not.
        """
        gradients = self._gradients(*self.param_groups)
        is_native = native.serves(*(gradient for _, gradient in gradients))
        at_once = acts_as_gpu(self.sae.W_dec)
        if not (is_native or at_once):
            self.sae.project_grad()
        if self.alignment is not None:
            self.alignment.project_grad()
        norm = self._norm_at_once
        if not at_once:
            norm = partial(self._norm, self._measure if is_native else _square)
        return [norm(self._gradients(group)) for group in self.param_groups]

    def _norm(
        self,
        square: Callable[[Tensor, Tensor], Tensor],
        gradients: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """() float32 the norm of gradients, from the square of each parameter's."""
        divided, held = torch.zeros(2, dtype=torch.float64, device=self.sae.W_dec.device).unbind()
        for parameter, found in gradients:
            total = divided if self._is_divided(parameter) else held
            total += square(parameter, found)
        return (self.sae.ranks.over_latents(divided) + held).sqrt().float()

    def _measure(self, parameter: Tensor, found: Tensor) -> Tensor:
        """() the square of a parameter's gradient, in float64, once its part along unit rows is removed."""
        parameter.grad = found = _laid_out_as(parameter, found)
        gradient, weights = _rows(found), _rows(parameter)
        squares = torch.empty(len(weights))
        arrays = (gradient, weights, self._is_unit(parameter), squares)
        native.spread("adam.measure_rows", len(weights), *arrays)
        return squares.sum(dtype=torch.float64)

    def _norm_at_once(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """() float32 the norm of gradients, without their parts along unit rows: a pass over each, for which the host does not wait."""
        parts: dict[bool, list[tuple[Tensor, Tensor | None]]] = {True: [], False: []}
        for parameter, gradient in gradients:
            found = _laid_out_as(parameter, gradient)
            parameter.grad = found
            unit_rows = _rows(parameter) if self._is_unit(parameter) else None
            as_rows = _rows if found.ndim == 2 else _flat
            parts[self._is_divided(parameter)].append((as_rows(found), unit_rows))
        square = measure(parts[False], self.sae.W_dec)
        if parts[True]:
            square = square + self.sae.ranks.over_latents(measure(parts[True], self.sae.W_dec))
        return square.sqrt().float()

    def share(self) -> None:
        """Sum over ranks the gradients of what more than one of them holds."""
        ranks = self.sae.ranks
        if ranks.size > 1:
            ranks.sum_(
                [
                    g
                    for p, g in self._gradients(*self.param_groups)
                    if ranks.of_batch > 1 or not self._is_divided(p)
                ]
            )

    def update(self, norms: Sequence[Tensor], skip: Tensor) -> None:
        """Scale each group's gradient, of its norm, down to the largest, take a step, go back to the constraints.

        Args:
            norms: () of each group's gradient.
            skip: () bool; true: weights and moments stay as they are.
        """
        gradients = self._gradients(*self.param_groups)
        if acts_as_gpu(skip) or not native.serves(*(parameter for parameter, _ in gradients)):
            of_groups = zip(self.param_groups, self.steps, self.rates, norms, strict=True)
            for group, steps, rate, norm in of_groups:
                self._update_at_once(group, steps, rate, norm, skip)
            self._align(skip)
            return
        if bool(skip):
            return
        for group, norm in zip(self.param_groups, norms, strict=True):
            self._update_group(group, min(1.0, self.largest_norm / (float(norm) + 1e-6)))
        self._align(skip)

    def _align(self, skip: Tensor) -> None:
        """Keep the alignment, in the weights and in a copy of them that products read."""
        if self.alignment is not None:
            self.alignment.project(skip)
            shadows.refresh(self.sae.W_enc)

    def _update_group(self, group: dict[str, Any], clip: float) -> None:
        (beta1, beta2), epsilon = group["betas"], group["eps"]
        for parameter, gradient in self._gradients(group):
            state = self.state[parameter]
            state["step"] += 1
            t = float(state["step"])
            rate, correction = group["lr"] / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t)
            numbers = map(np.float32, (clip, rate, beta1, beta2, correction, epsilon))
            tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
            rows = [_rows(tensor) for tensor in tensors]
            is_unit = self._is_unit(parameter)
            native.spread("adam.update_rows", len(rows[0]), *rows, is_unit, *numbers)

    def _update_at_once(
        self,
        group: dict[str, Any],
        steps: Tensor,
        rate: Tensor,
        norm: Tensor,
        skip: Tensor,
    ) -> None:
        """One pass over each parameter of a group, for which the host does not wait."""
        parts: list[Part | None] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                parts.append(None)
                continue
            state, gradient = self.state[parameter], _laid_out_as(parameter, parameter.grad)
            as_rows = _rows if parameter.ndim == 2 else _flat
            moments = as_rows(state["exp_avg"]), as_rows(state["exp_avg_sq"])
            copy = shadows.refresh(parameter)
            shadow = None if copy is None else as_rows(copy)
            tensors = as_rows(parameter), as_rows(gradient), *moments, shadow
            parts.append(Part(*tensors, is_unit=self._is_unit(parameter)))
        options = {"betas": group["betas"], "eps": group["eps"], "largest_norm": self.largest_norm}
        update(parts, norm, steps, rate, skip, **options)
        for parameter, _ in self._gradients(group):
            shadows.written(parameter)

    def _gradients(self, *groups: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """The parameters of some groups that have a gradient, and theirs."""
        return [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]

    def _is_divided(self, parameter: Tensor) -> bool:
        """Return whether each rank has a part of the parameter of its own."""
        names = self.sae.of_latents if self.sae.ranks.of_latents > 1 else ()
        return any(parameter is getattr(self.sae, name) for name in names)

    def _is_unit(self, parameter: Tensor) -> bool:
        return self.sae.has_unit_norm and parameter is self.sae.W_dec


def _square(parameter: Tensor, found: Tensor) -> Tensor:
    """() the square of a parameter's gradient, in float64."""
    norm: Tensor = torch.linalg.vector_norm(found, dtype=torch.float64)
    return norm**2


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in its parameter's layout."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _rows(tensor: Tensor) -> Tensor:
    """A parameter, or a tensor laid out as one, as contiguous rows."""
    tensor = tensor.detach()
    if tensor.ndim < 2:
        return tensor.view(1, -1)
    return tensor if tensor.is_contiguous() else tensor.t()
