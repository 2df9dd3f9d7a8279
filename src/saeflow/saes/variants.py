"""The table of variants: a new one is one file, one line here."""

from collections.abc import Mapping
from typing import Any

from saeflow.config.options import AuxKOptions
from saeflow.errors import UserError
from saeflow.saes.abs_topk import AbsTopK
from saeflow.saes.adaptive_k import AdaptiveK
from saeflow.saes.base import SAE
from saeflow.saes.batch_topk import BatchTopK
from saeflow.saes.entmax import Entmax
from saeflow.saes.feature_choice import FeatureChoice
from saeflow.saes.gated import Gated
from saeflow.saes.jumprelu import JumpReLU
from saeflow.saes.matching_pursuit import MatchingPursuit
from saeflow.saes.matryoshka import Matryoshka
from saeflow.saes.p_anneal import PAnneal
from saeflow.saes.relu import ReLU
from saeflow.saes.soft_topk import SoftTopK
from saeflow.saes.sparsemax import Sparsemax
from saeflow.saes.top_afa import TopAFA
from saeflow.saes.topk import TopK

VARIANTS: dict[str, type[SAE]] = {
    "abs_topk": AbsTopK,
    "adaptive_k": AdaptiveK,
    "batch_topk": BatchTopK,
    "entmax": Entmax,
    "feature_choice": FeatureChoice,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "matching_pursuit": MatchingPursuit,
    "matryoshka": Matryoshka,
    "p_anneal": PAnneal,
    "relu": ReLU,
    "soft_topk": SoftTopK,
    "sparsemax": Sparsemax,
    "top_afa": TopAFA,
    "topk": TopK,
}
"""`saeflow.config.variants` reads this table without importing it: the options of NAME are NAMEOptions of the same file."""


def build(variant: str, d_in: int, d_sae: int, options: Mapping[str, Any]) -> SAE:
    """Make an SAE of a variant, with zero weights until `initialise` or a load.

    Args:
        options: those that are not stated have the variant's defaults, where it has them.

    Raises:
        UserError: an unknown variant, an unknown or missing option, a value out of range.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant: expected one of {', '.join(VARIANTS)}, found {variant!r}.")
    of_variant: Any = VARIANTS[variant]  # whose constructor takes the variant's own options
    try:
        read = of_variant.Options.read(options, d_sae)
    except UserError as error:
        raise error.within(variant) from None
    made: SAE = of_variant(d_in, d_sae, read)
    made.orthogonality_weight = read.orthogonality_weight
    made.orthogonality_chunk = read.orthogonality_chunk
    made.aligned = read.aligned
    if isinstance(read, AuxKOptions):
        made.auxk_latents = read.auxk_latents
    return made
