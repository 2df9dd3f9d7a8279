"""Application of a differentiable function of one tensor, which torch leaves without a type."""

from torch import Tensor
from torch.autograd import Function


def applied(function: type[Function], *arguments: object) -> Tensor:
    """Return `function.apply(*arguments)`: the tensor that its `forward` returns."""
    result: Tensor = function.apply(*arguments)
    return result
