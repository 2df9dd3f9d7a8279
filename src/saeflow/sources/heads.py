"""Final norm and lm head of a language model: from final hidden states to logits, as the model itself does it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from saeflow.errors import UserError
from saeflow.sources.attach import forward_of
from saeflow.sources.structure import body_of, no_cache, structure_of

_ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Share of the largest logit that kernels of another order may add; with fewer bits, four times their own rounding."""


def has_head(model: Any) -> bool:
    """Tell whether a model gives logits of tokens from final hidden states."""
    return bool(body_of(model)) and model.get_output_embeddings() is not None


@torch.no_grad()
def no_predictions(model: Any) -> str | None:
    """Say why a model predicts no next tokens, so that it has no cross-entropy; None where it predicts them."""
    name = type(model).__name__
    if not has_head(model):
        return f"{name} has no lm head"
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
    scores, changed = (
        model(input_ids=one, **no_cache(model)).logits[:, 0].float() for one in (ids, other)
    )
    bound = max(_ROUNDING, 4 * torch.finfo(model.dtype).eps if model.dtype != torch.float32 else 0)
    if float((scores - changed).abs().max()) > bound * float(scores.abs().max()):
        return f"{name} sees the tokens that it would predict"
    return None


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the lm head of a causal language model.

    Raises:
        UserError: it has none.
    """
    path = structure_of(model).final_norm
    if path is None:
        raise UserError(
            f"{type(model).__name__}: expected a norm after its last block, found none, so that decoder rows have no "
            "logit lens. Leave latent pages out for this model."
        )
    return model.get_submodule(path)


class _Hidden(BaseModelOutputWithPast):
    """Final hidden states as a body gives them; whatever else a head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits from final hidden states: all that the model itself does with them.

    Args:
        model: a causal language model.
        hidden: (..., d_model), what `run_from` gives.

    Returns:
        (..., vocabulary) logits in nats, dtype of the lm head.

    Raises:
        UserError: the model has no head.
    """
    body = body_of(model)
    causal: Any = model
    if not body or causal.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__}: expected a causal language model, found no lm head. Load it with "
            "AutoModelForCausalLM."
        )
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    output = _Hidden(last_hidden_state=rows)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    was_asked = False

    def give(*_: Any, **__: Any) -> _Hidden:
        nonlocal was_asked
        was_asked = True
        return output

    names = body.split(".")
    around = [model.get_submodule(".".join(names[: n + 1])) for n in range(len(names))]
    head = causal.get_output_embeddings()
    with ExitStack() as undo:
        for module in (
            around
        ):  # a head may ask the body or what is around it, unless it stands there itself (Llama 4)
            if all(inside is not head for inside in module.modules()):
                undo.enter_context(forward_of(module, give))
        scores: Tensor = causal(input_ids=ids, **no_cache(causal)).logits
    if not was_asked:
        raise UserError(
            f"{type(model).__name__}: expected its head to take what {body} gives, found that it does not. Choose "
            "another model."
        )
    return scores.reshape(*hidden.shape[:-1], scores.shape[-1])
