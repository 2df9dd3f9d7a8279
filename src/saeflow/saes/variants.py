"""The table of variants: a new one is one file, one line here."""

import inspect
from collections.abc import Mapping
from typing import Any

from saeflow.config.options import with_defaults
from saeflow.errors import UserError
from saeflow.saes.adaptive_k import AdaptiveK
from saeflow.saes.base import SAE
from saeflow.saes.batch_topk import BatchTopK
from saeflow.saes.entmax import Entmax
from saeflow.saes.gated import Gated
from saeflow.saes.jumprelu import JumpReLU
from saeflow.saes.matryoshka import Matryoshka
from saeflow.saes.p_anneal import PAnneal
from saeflow.saes.relu import ReLU
from saeflow.saes.soft_topk import SoftTopK
from saeflow.saes.sparsemax import Sparsemax
from saeflow.saes.topk import TopK

VARIANTS: dict[str, type[SAE]] = {
    "adaptive_k": AdaptiveK,
    "batch_topk": BatchTopK,
    "entmax": Entmax,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "p_anneal": PAnneal,
    "relu": ReLU,
    "soft_topk": SoftTopK,
    "sparsemax": Sparsemax,
    "topk": TopK,
}


def build(variant: str, d_in: int, d_sae: int, options: Mapping[str, Any]) -> SAE:
    """A new SAE of a variant, with zero weights until `initialise` or a load.

    Args:
        options: those that are not stated have the variant's defaults, where it has them.

    Raises:
        UserError: an unknown variant, an unknown or missing option, a value out of range.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant: expected one of {', '.join(VARIANTS)}, found {variant!r}.")
    known = _options(VARIANTS[variant])
    whole = with_defaults(variant, options) if isinstance(options, Mapping) else {}
    if set(whole) != set(known):
        found = ", ".join(options) if isinstance(options, Mapping) else repr(options)
        raise UserError(
            f"{variant}: expected the options {', '.join(known)}, found {found or 'none'}."
        )
    return VARIANTS[variant](d_in, d_sae, **whole)


def _options(variant: type[SAE]) -> list[str]:
    """The options of a variant: its constructor's own, after those of the variants it builds on."""
    found: dict[str, None] = {}
    for layer in reversed(variant.__mro__):
        if issubclass(layer, SAE) and "__init__" in vars(layer):
            parameters = inspect.signature(vars(layer)["__init__"]).parameters.values()
            found |= {own.name: None for own in parameters if own.kind is own.KEYWORD_ONLY}
    return list(found)
