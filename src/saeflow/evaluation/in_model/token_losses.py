"""Losses of next-token predictions, and their divergence from the clean model's, from final hidden states.

Logits are float32 and are worked out a few tokens at a time: those of a whole batch would not fit in memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from saeflow.sources.heads import logits

_LOGITS_AT_ONCE = 1 << 24


def _slices(
    model: Any, hidden: Tensor, token_ids: Tensor
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Logits (m, vocabulary) float32 and targets (m,) of all predicted tokens, a few at a time."""
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = token_ids[:, 1:].reshape(-1).long()
    size = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    for start in range(0, len(flat), size):
        part = slice(start, start + size)
        yield logits(model, flat[part]).float(), targets[part], part


def log_normaliser(scores: Tensor) -> Tensor:
    """log sum exp of each row (m, vocabulary) float32, summed in float64: (m,) float64.

    (torch.logsumexp in float32 is off by 1e-5 nats, always to one side, on 50 000 entries.)
    """
    most = scores.amax(1)
    return (scores - most[:, None]).exp_().sum(1, dtype=torch.float64).log() + most


def _losses(scores: Tensor, targets: Tensor) -> Tensor:
    return log_normaliser(scores) - scores.gather(1, targets[:, None])[:, 0]


def token_losses(model: Any, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Cross-entropy (n (length - 1),) float64 in nats of each next token, from final hidden states."""
    slices = _slices(model, hidden, token_ids)
    return torch.cat([_losses(scores, targets) for scores, targets, _ in slices])


def losses_and_divergences(
    model: Any, hidden: Tensor, clean_hidden: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token and KL(clean || spliced), both (n (length - 1),) in nats."""
    flat_clean = clean_hidden[:, :-1].reshape(-1, clean_hidden.shape[-1])
    losses, divergences = [], []
    for scores, targets, part in _slices(model, hidden, token_ids):
        losses.append(_losses(scores, targets))
        clean = log_softmax(logits(model, flat_clean[part]).float(), dim=-1)
        difference = clean - log_softmax(scores, dim=-1)
        divergences.append((clean.exp() * difference).sum(1, dtype=torch.float64))
    return torch.cat(losses), torch.cat(divergences)


def linear_head(model: Any) -> Tensor | None:
    """The lm head's weights (vocabulary, d_model), if it is nothing but a matrix on the model's one device."""
    head = model.get_output_embeddings()
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return None
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    # Models that scale, cap or project before or after it give other logits.
    generator = torch.Generator().manual_seed(0)
    hidden = 100 * torch.randn(1, 2, head.in_features, generator=generator)
    hidden = hidden.to(head.weight.device, head.weight.dtype)
    return head.weight if torch.equal(logits(model, hidden), head(hidden)) else None


def clean_expectations(
    model: Any, head: Tensor, hidden: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The clean side's losses, and what a linear lm head's KL needs instead of all probabilities p.

    With clean and spliced hidden states c and h of a token and u = p head, the expected logit is a
    product with one vector: KL = <u, c> - logsumexp(head c) - <u, h> + logsumexp(head h).

    Returns:
        Cross-entropy (n (length - 1),) float64 of each next token, u (n (length - 1), d_model)
        float32, and <u, c> - logsumexp(head c) (n (length - 1),) float64.
    """
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    losses, expected, offsets = [], [], []
    for scores, targets, part in _slices(model, hidden, token_ids):
        normaliser = log_normaliser(scores)
        losses.append(normaliser - scores.gather(1, targets[:, None])[:, 0])
        p = scores.softmax(1)
        mass = p.sum(1, keepdim=True, dtype=torch.float64)  # off by 1e-5 from 1 on many entries
        expected.append(((p.to(head.dtype) @ head) / mass).float())
        offsets.append(_product(expected[-1], flat[part]) - normaliser)
    return torch.cat(losses), torch.cat(expected), torch.cat(offsets)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def losses_and_divergences_from_expectations(
    model: Any, hidden: Tensor, expected: Tensor, offsets: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """`losses_and_divergences` with the lm head once: see `clean_expectations`."""
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    losses, divergences = [], []
    for scores, targets, part in _slices(model, hidden, token_ids):
        normaliser = log_normaliser(scores)
        losses.append(normaliser - scores.gather(1, targets[:, None])[:, 0])
        divergences.append(offsets[part] - _product(expected[part], flat[part]) + normaliser)
    return torch.cat(losses), torch.cat(divergences)
