"""Zipf's law with a shift (Mandelbrot 1953): how often each of some ranks is expected, and its fit to counts."""

import torch
from torch import Tensor

LARGEST_EXPONENT = 20.0
_HALVINGS = 60  # of an interval of exponents, down to the spacing of float64


def zipf(n: int, exponent: float, shift: float) -> Tensor:
    """Return shares (n,) float64 of ranks 1..n, which sum to 1: proportional to (rank + shift)^-exponent."""
    return torch.softmax(-exponent * _logs(n, shift), 0)


def fit_zipf(
    counts: Tensor, exponent: float | None = None, shift: float | None = None
) -> tuple[float, float]:
    """Return the exponent and the shift of the law under which counts are likeliest.

    Counts are sorted; rank r has the r-th largest. The likelihood is the multinomial one, so that each event weighs
    alike: many rare latents do not outvote the frequent ones, and latents that never fired need no special case. For
    one shift it is concave in the exponent; shifts are tried at 0 and at powers of sqrt 2 from 1/4 to n.

    Args:
        counts: (n,) numbers >= 0, not all 0, on any device: the host waits for them.
        exponent: a known one, in 0..`LARGEST_EXPONENT`; None: it is fitted.
        shift: a known one, >= 0; None: it is fitted.
    """
    ordered = counts.detach().double().cpu().sort(descending=True).values
    share = ordered / ordered.sum()
    tried = _shifts(len(share)) if shift is None else [shift]
    found = []
    for one in tried:
        logs = _logs(len(share), one)
        best = _exponent(logs, float(share @ logs)) if exponent is None else exponent
        likelihood = -best * share @ logs - torch.logsumexp(-best * logs, 0)
        found.append((float(likelihood), best, one))
    _, best, one = max(found)
    return best, one


def _logs(n: int, shift: float) -> Tensor:
    return (torch.arange(1, n + 1, dtype=torch.float64) + shift).log()


def _shifts(n: int) -> list[float]:
    shifts, one = [0.0], 0.25
    while one <= n:
        shifts.append(one)
        one *= 2**0.5
    return shifts


def _exponent(logs: Tensor, wanted: float) -> float:
    """The exponent at which the mean of the logarithms is the wanted one: the mean falls as the exponent grows."""
    low, high = 0.0, LARGEST_EXPONENT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_low = float(torch.softmax(-middle * logs, 0) @ logs) > wanted
        low, high = (middle, high) if is_low else (low, middle)
    return (low + high) / 2
