"""Controls for adaptivity: what an SAE loses when the k that it chose for each input is taken from it.

On the same rows, with the same encoder and decoder, the k largest latents of each row are kept with

- shuffled_k: the k of another row, drawn as one permutation of all rows;
- k_by_norm: the same k's, handed out by the norm of the activation: the largest k to the longest row, and so on
  (that the norm alone decides k is the null hypothesis of adaptivity; arXiv:2503.24277);
- mean_k: the mean k in every row, rounded up in as many random rows as it takes to have equally many;
- batch_threshold: no k; all latents above one threshold for all rows, at which equally many are active.

Latents are ranked by their activations before the selection, so those that the SAE left out can enter.
Differences to the SAE's own k are paired by unit (document, image, sample). An adaptive k that is worth something
has errors below all four.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.intervals import PerUnit, Sums, bounds, count, ratios, resample, total
from saeflow.evaluation.measure import Lines, Result, Seen
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.rows import EvaluatedRows
from saeflow.operators import keep_topk

CONTROLS = ("shuffled_k", "k_by_norm", "mean_k", "batch_threshold")
METRICS = ("fvu", "nmse", "l0_mean")
_BITS = 16


class OwnK:
    """The k of every evaluated row, rounded down as the selection does, its norm, and how many latents were active.

    Args:
        rows: how many are evaluated. Their k and norm have their place from the start: small arrays kept between
            the large ones of every batch would hold memory that those leave.
    """

    def __init__(self, rows: int) -> None:
        self.held, self.norms = np.empty(rows, np.int32), np.empty(rows, np.float32)
        self.rows = 0
        self.active = 0

    def update(self, seen: Seen) -> None:
        self.active += int(seen.l0.sum())
        if seen.allowed is not None:
            stop = self.rows + len(seen.allowed)
            self.held[self.rows : stop] = seen.allowed.floor().cpu().numpy()
            self.norms[self.rows : stop] = seen.x.norm(dim=1).cpu().numpy()
            self.rows = stop

    def result(self) -> Result:
        return Result()

    @property
    def k(self) -> np.ndarray | None:
        """(rows,) int32; None for an SAE that chooses none."""
        return self.held[: self.rows] if self.rows else None

    @property
    def norm(self) -> np.ndarray:
        """(rows,) float32 norms of the same rows."""
        return self.norms[: self.rows]


class Controls:
    """The controls of one SAE, where it chooses a k for each row.

    Args:
        sae, rows: as for `measure_rows`.
        own_sums: sees the same rows before this observer's result is asked for.
        settings: resamples and seed.
    """

    def __init__(
        self, sae: Any, rows: EvaluatedRows, own_sums: PerUnit, settings: Mapping[str, int]
    ) -> None:
        self.sae, self.rows, self.own_sums, self.settings = sae, rows, own_sums, settings
        self.own = OwnK(rows.statistics.rows)
        self.found: dict[str, PerUnit] = {}
        """By control, its sums, once the result was asked for."""

    def update(self, seen: Seen) -> None:
        self.own.update(seen)

    def result(self) -> Result:
        """Lines of the table `controls`, from three further passes of the encoder over the rows."""
        if self.own.k is None:
            return Result()
        self.found = controlled(self.sae, self.rows, self.own, self.own_sums, self.settings)
        sums = {name: one.sums for name, one in self.found.items()}
        return Result(tables={"controls": _lines(self.own_sums.sums, sums, self.settings)})


def activations(sae: Any, x: Tensor) -> Tensor:
    """(B, d_sae) of which an SAE with a k for each input keeps the k largest."""
    acts: Tensor = sae.pre_activations(x).relu()
    return acts


def threshold_for(batches: Callable[[], Iterator[Tensor]], active: int) -> float:
    """The threshold above which exactly `active` of all values lie (fewer where values are tied).

    The bits of a positive float32 are ordered as the number is: two passes that count them by their
    upper and lower halves find the value without keeping any.

    Args:
        batches: walks over the values, (B, d_sae) float32 each, of which only those above 0 count.
        active: how many are to be above.
    """
    upper = np.zeros(1 << _BITS, np.int64)
    for values in batches():
        upper += _counts(_bits(values) >> _BITS)
    if active >= upper.sum():
        return 0.0
    above = np.cumsum(upper[::-1])[::-1]
    half = int(np.flatnonzero(above > active)[-1])
    lower = np.zeros(1 << _BITS, np.int64)
    for values in batches():
        whole = _bits(values)
        lower += _counts(whole[whole >> _BITS == half] & ((1 << _BITS) - 1))
    rest = active - (int(above[half + 1]) if half + 1 < len(above) else 0)
    above = np.cumsum(lower[::-1])[::-1]
    bits = (half << _BITS) | int(np.flatnonzero(above > rest)[-1])
    return float(np.array([bits], np.int32).view(np.float32)[0])


def _bits(values: Tensor) -> Tensor:
    flat = values.flatten().float()
    return flat[flat > 0].view(torch.int32)


def _counts(indices: Tensor) -> np.ndarray:
    counts: np.ndarray = torch.bincount(indices, minlength=1 << _BITS).cpu().numpy()
    return counts


def mean_k(k: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """As many as `k` (rows,) in all, but equally many in each row, or one more."""
    least, more = divmod(int(k.sum()), len(k))
    same = np.full(len(k), least, k.dtype)
    same[random.choice(len(k), more, replace=False)] += 1
    return same


def by_norm(k: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The same k's (rows,), in the order of the norms: the row of rank i has the k of rank i."""
    placed = np.empty_like(k)
    placed[np.argsort(norm, kind="stable")] = np.sort(k)
    return placed


def controlled(
    sae: Any,
    rows: EvaluatedRows,
    own: OwnK,
    own_sums: PerUnit,
    settings: Mapping[str, int],
) -> dict[str, PerUnit]:
    """Each control's sums; three further passes of the encoder over the rows.

    Args:
        sae: whose `allowed_k` is a number for each row.
        rows: as of `measure_rows`.
        own: of the SAE as it is, from a pass over the same rows.
        own_sums: of each unit, from that pass.
        settings: resamples and seed.
    """
    assert own.k is not None

    def batches() -> Iterator[Tensor]:
        for batch in rows:
            yield activations(sae, batch.x)

    random = np.random.default_rng(settings["seed"])
    counts = {"shuffled_k": random.permutation(own.k), "mean_k": mean_k(own.k, random)}
    counts["k_by_norm"] = by_norm(own.k, own.norm)
    found = {name: PerUnit(own_sums.units[own_sums.unit_of], settings) for name in CONTROLS}
    rebuilt = Reconstruction(rows.statistics.mean)
    with torch.inference_mode():
        threshold = threshold_for(batches, own.active)
        start = 0
        for batch in rows:
            x = batch.x
            acts = activations(sae, x)
            context = batch.column("context")
            for name in CONTROLS:
                if name in counts:
                    k = (
                        torch.from_numpy(counts[name][start : start + len(x)])
                        .long()
                        .to(acts.device)
                    )
                    latents = keep_topk(acts, k)
                else:
                    latents = torch.where(acts > threshold, acts, 0.0)
                terms = rebuilt.add(x, sae.decode(latents))
                found[name].add_rows(context, terms, (latents != 0).sum(1))
            start += len(x)
    return found


def _lines(own: Sums, controls: Mapping[str, Sums], settings: Mapping[str, int]) -> Lines:
    lines = []
    units = count(own)
    own_drawn, own_values = ratios(resample(own, settings)), ratios(total(own))
    for name, sums in {"own": own, **controls}.items():
        drawn, values = ratios(resample(sums, settings)), ratios(total(sums))
        for metric in METRICS:
            low, high = bounds(drawn[metric], units)
            least, most = bounds(drawn[metric] - own_drawn[metric], units)
            line = {"control": name, "metric": metric, "value": float(values[metric])}
            difference = float(values[metric] - own_values[metric])
            line |= {"low": low, "high": high, "difference": difference}
            lines.append(line | {"difference_low": least, "difference_high": most})
    return lines
