"""Operators: pure, differentiable functions on the last dimension, and sparse latents."""

from saeflow.operators.auxk import auxk_loss, rebuild, residual_share, select_auxk, share_left
from saeflow.operators.batch_topk import batch_topk, batch_topk_sparse
from saeflow.operators.entmax import entmax, entmax_of, entmax_sparse
from saeflow.operators.feature_choice import (
    allotment,
    choose_by_column,
    feature_choice,
    order_columns,
)
from saeflow.operators.geometric_median import geometric_median
from saeflow.operators.jumprelu import jumprelu, step
from saeflow.operators.matching_pursuit import matching_pursuit
from saeflow.operators.orthogonality import orthogonality
from saeflow.operators.penalty import penalty
from saeflow.operators.pre_acts import lowered, perceptron, pre_acts, rounding
from saeflow.operators.products import (
    decode_sparse,
    gather_columns,
    gather_pre_acts,
    squared_errors,
)
from saeflow.operators.soft_topk import soft_latents, soft_topk, soft_topk_sparse
from saeflow.operators.sparse import SparseLatents, acts_as_gpu, room
from saeflow.operators.sparsemax import sparsemax, sparsemax_of, sparsemax_sparse
from saeflow.operators.topk import keep_topk, topk_indices, topk_sparse
from saeflow.operators.zipf import fit_zipf, zipf

__all__ = [
    "SparseLatents",
    "acts_as_gpu",
    "allotment",
    "auxk_loss",
    "batch_topk",
    "batch_topk_sparse",
    "choose_by_column",
    "decode_sparse",
    "entmax",
    "entmax_of",
    "entmax_sparse",
    "feature_choice",
    "fit_zipf",
    "gather_columns",
    "gather_pre_acts",
    "geometric_median",
    "jumprelu",
    "keep_topk",
    "lowered",
    "matching_pursuit",
    "order_columns",
    "orthogonality",
    "penalty",
    "perceptron",
    "pre_acts",
    "rebuild",
    "residual_share",
    "room",
    "rounding",
    "select_auxk",
    "share_left",
    "soft_latents",
    "soft_topk",
    "soft_topk_sparse",
    "sparsemax",
    "sparsemax_of",
    "sparsemax_sparse",
    "squared_errors",
    "step",
    "topk_indices",
    "topk_sparse",
    "zipf",
]
