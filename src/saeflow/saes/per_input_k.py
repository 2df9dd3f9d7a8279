"""Common parts of SAEs that choose k for each input: the hard and the soft selection."""

from abc import abstractmethod

from torch import Tensor

from saeflow.operators import (
    SparseLatents,
    gpu,
    keep_topk,
    soft_latents,
    soft_topk,
    soft_topk_sparse,
    topk_sparse,
)
from saeflow.operators.gpu import dense
from saeflow.operators.gpu.on_lists import FAR
from saeflow.saes.base import SAE
from saeflow.saes.density import FollowsDensity
from saeflow.saes.schedules import Moving


class PerInputK(FollowsDensity):
    """z = v m, v = relu(a), with a mask m of k_hat latents, k_hat real and different for each input.

    While `temperature` is above 0 (in training only), m is the soft top-k of v, whose gradient reaches
    k_hat; otherwise it is the hard top-floor(k_hat).

    Attributes:
        temperature: of the soft top-k; 0 is hard.
        is_fixed: the selected pre-activations are taken as constants, so that the error reaches the decoder
            alone. AuxK still trains the encoder's columns of dead latents.
        reach: temperatures below the threshold down to which the soft mask is above 0.
    """

    temperature = Moving[float]()
    is_fixed: bool = False
    reach: float | None = None

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.temperature = 0.0

    @abstractmethod
    def k_hat(self, x: Tensor) -> Tensor:
        """(B,) in the weights' precision, in 0..d_sae: how many latents each input may use, with gradient."""

    @property
    def heat(self) -> float | Tensor:
        """The temperature for kernels."""
        result: float | Tensor = self.moved("temperature")
        return result

    def dials(self) -> dict[str, object]:
        return {**super().dials(), "is_soft": self.is_soft}

    @property
    def is_soft(self) -> bool:
        return self.training and self.temperature > 0

    @property
    @abstractmethod
    def most_k(self) -> int:
        """The largest k_hat there can be, rounded up."""

    @property
    def most(self) -> int:
        return max(2 * self.most_k, super().most) if self.is_soft else self.most_k

    @property
    def is_sparse(self) -> bool:
        return not self.is_soft or super().is_sparse

    def widen(self) -> None:
        if self.is_soft:
            super().widen()
        else:  # which has no dense step
            SAE.widen(self)

    def condition(self, x: Tensor) -> Tensor | None:
        return self.k_hat(x.to(self.W_dec.dtype))

    def allowed_k(self, x: Tensor) -> Tensor | None:
        return self.condition(x)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        v = (pre_acts.detach() if self.training and self.is_fixed else pre_acts).relu()
        if self.is_soft:
            return v * soft_topk(v, condition, self.heat, reach=self.reach)
        return keep_topk(v, condition.detach().floor().long())

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents, and their sum where one pass finds both."""
        if not (self.is_soft and gpu.serves_scores(scores) and isinstance(self.heat, Tensor)):
            return super().activate_at_once(scores, condition)
        assert condition is not None
        return dense.soft(scores, condition, self.heat, self.reach or FAR)

    @property
    def reads_margin(self) -> bool:
        return self.is_soft

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        assert condition is not None
        if self.is_soft:
            return soft_topk_sparse(
                pre_acts, condition, self.heat, margin, self.room, reach=self.reach, of_relu=True
            )
        k = condition.floor().long()
        return self.largest_of_rows(topk_sparse(pre_acts, k, self.room), k)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        if self.training and self.is_fixed:
            selected = selected.with_whole(selected.values.detach())
        if not self.is_soft:
            return selected.relu()
        assert condition is not None
        return soft_latents(selected, condition, self.heat, reach=self.reach)
