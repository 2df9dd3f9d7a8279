"""One threshold in the place of a k for each input, for libraries that know no such SAE, and what it costs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saeflow.errors import UserError
from saeflow.evaluation.controls import OwnK, activations, threshold_for
from saeflow.evaluation.measure import measure_rows
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.exchange.plain import Plain, affine, sae_of
from saeflow.saes.base import SAE
from saeflow.saes.per_input_k import PerInputK

_BATCH = 1024
_ALL = RowSelection(positions="all", norm_limit=None)


def calibrate(sae: SAE, store: Any) -> tuple[Plain, dict[str, Any]]:
    """A jumprelu of one threshold, under which as many latents are active on a store as the SAE has.

    Args:
        sae: whose k differs by input: soft_topk or adaptive_k.
        store: held-out activations of the place it was trained on.

    Returns:
        What is exported, and what it costs: the threshold, and fvu and l0_mean on the store, the SAE's own
        and those of what is exported.

    Raises:
        UserError: another variant, or a store of another width.
    """
    if not isinstance(sae, PerInputK):
        raise UserError(
            f"--store: expected soft_topk or adaptive_k, which a threshold can stand for, found "
            f"{type(sae).__name__}. Take --library hub, which holds any variant."
        )
    if store.d_in != sae.d_in:
        raise UserError(
            f"{store.path}: expected activations of width {sae.d_in}, found {store.d_in}. Give the store that "
            "the SAE is evaluated on."
        )

    rows = EvaluatedRows(store, _ALL, _BATCH, "cpu")

    def batches() -> Iterator[Tensor]:
        for batch in rows:
            yield activations(sae, batch.x)

    own = OwnK(rows.statistics.rows)
    measured = {"own": measure_rows(sae, rows, [own])}
    with torch.inference_mode():
        threshold = threshold_for(batches, own.active)
    plain = Plain("jumprelu", **affine(sae), threshold=torch.full((sae.d_sae,), threshold))
    measured["exported"] = measure_rows(sae_of(plain)[2], rows)
    facts: dict[str, Any] = {"threshold": threshold, "rows": rows.statistics.rows}
    for name, found in measured.items():
        facts |= {f"{metric}_{name}": found.metrics[metric] for metric in ("fvu", "l0_mean")}
    return plain, facts
