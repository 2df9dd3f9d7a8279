"""Every latent of an SAE: where it fires most, how often and how strongly, what it writes, what is near it.

Two passes over the evaluation split. The first counts, and keeps the strongest rows of each latent; the second
looks up each latent's activations around them. Memory holds a few numbers a latent and one a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from saeflow.evaluation.rows import EvaluatedRows
from saeflow.files import atomic_file

LATENTS = "latents.safetensors"
BINS = 48
"""Bins of the histogram of activations: half an octave wide, from 2^LOWEST on; the ends take what is beyond."""
LOWEST = -12.0
_CANDIDATES = (
    4  # times as many rows as examples are kept, of which those of different contexts are taken
)
_AT_ONCE = 2**27  # numbers of a block of products


def write_latents(
    sae: Any,
    rows: EvaluatedRows,
    tokens: np.ndarray | None,
    settings: Mapping[str, int],
    folder: Path,
    lens: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Collect what the cards show and write it to `latents.safetensors`.

    Args:
        sae: with `encode` and `directions`, on the device of the rows.
        rows: of the evaluation split.
        tokens: (contexts, length) token ids; None for images.
        settings: examples a latent; tokens before and after the strongest one (text) or, of images, patches a
            context and contexts to look among; neighbours.
        folder: gets the file.
        lens: what `logit_lens` found.

    Returns:
        fired (d_sae), maximum (d_sae), histogram (d_sae, BINS), value, context, position (d_sae, examples: -1
        where there are fewer), shades (d_sae, examples, window) uint8 of 255 for the latent's maximum, token
        (same shape, int32, -1 outside of the context) of text, neighbours and cosines (d_sae, neighbours),
        rows (1).
    """
    found, columns = _strongest(sae, rows, settings)
    examples = _distinct(
        found.pop("values"), found.pop("rows_of"), columns["context"], settings["examples"]
    )
    shown = examples.pop("row")
    for name in ("context", "position"):
        examples[name] = np.where(shown >= 0, columns[name][shown], -1).astype(np.int32)
    places = _window(examples["position"], settings)
    lookup = _Lookup(columns)
    wanted = lookup.rows(examples["context"][..., None], places)
    wanted[shown < 0] = -1
    values = _look_up(sae, rows, wanted)
    scale = np.maximum(found["maximum"], 1e-30)[:, None, None]
    shades = np.ceil(np.clip(values / scale, 0, 1) * 255).astype(np.uint8)
    if tokens is not None:
        inside = (places >= 0) & (places < tokens.shape[1]) & (shown[..., None] >= 0)
        context = np.maximum(examples["context"], 0)[..., None]
        ids = tokens[context, np.clip(places, 0, tokens.shape[1] - 1)]
        examples["token"] = np.where(inside, ids.astype(np.int32), -1)
    whole = {
        **found,
        **examples,
        "shades": shades,
        **neighbours(sae.directions(), settings["neighbours"]),
    }
    whole |= dict(lens or {})
    with atomic_file(folder / LATENTS) as staged:
        save_file({name: np.ascontiguousarray(part) for name, part in whole.items()}, staged)
    return whole


def _strongest(
    sae: Any, rows: EvaluatedRows, settings: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Counts of all rows, and the strongest rows of each latent; columns of all rows of the store."""
    store, device = rows.store, rows.device
    columns = {name: store.column(name, 0, store.rows) for name in ("context", "position")}
    among = settings.get("contexts")
    kept = _CANDIDATES * settings["examples"]
    fired: Any = 0
    values, rows_of, histogram, maximum = None, None, None, None
    total = 0
    with torch.inference_mode():
        for batch in rows:
            latents, places = sae.encode(batch.x).float(), batch.numbers
            total += len(places)
            if values is None or rows_of is None or histogram is None or maximum is None:
                d_sae = latents.shape[1]
                values = torch.zeros(d_sae, kept, device=device)
                rows_of = torch.full((d_sae, kept), -1, dtype=torch.int64, device=device)
                maximum = torch.zeros(d_sae, device=device)
                histogram = torch.zeros(d_sae * BINS, dtype=torch.int64, device=device)
            maximum = torch.maximum(maximum, latents.amax(0))
            fired = fired + (latents != 0).sum(0)
            histogram += _counts(latents, d_sae)
            if among is not None:
                near = batch.column("context") < among
                latents, places = latents[torch.from_numpy(near).to(device)], places[near]
            top = latents.t().topk(min(kept, len(places)), dim=1)
            joined = torch.cat([values, top.values], 1)
            numbers = torch.from_numpy(places).to(device)[top.indices]
            order = joined.topk(kept, dim=1)
            values, rows_of = (
                order.values,
                torch.cat([rows_of, numbers], 1).gather(1, order.indices),
            )
    assert values is not None
    assert rows_of is not None
    assert histogram is not None
    assert maximum is not None
    arrays = {"values": values, "rows_of": rows_of.masked_fill(values <= 0, -1), "fired": fired,
              "histogram": histogram.view(-1, BINS).int(), "maximum": maximum}  # fmt: skip
    counted = {name: part.cpu().numpy() for name, part in arrays.items()}
    return counted | {"rows": np.array([total])}, columns


def _counts(latents: Tensor, d_sae: int) -> Tensor:
    """(d_sae BINS,) activations of a batch in each bin of each latent."""
    row, latent = latents.nonzero(as_tuple=True)
    octaves = latents[row, latent].abs().log2()
    bins = ((octaves - LOWEST) * 2).floor().clamp(0, BINS - 1).long()
    return torch.bincount(latent * BINS + bins, minlength=d_sae * BINS)


def _distinct(
    values: np.ndarray, rows: np.ndarray, contexts: np.ndarray, examples: int
) -> dict[str, np.ndarray]:
    """The strongest rows of each latent, one a context."""
    chosen = np.full((len(values), examples), -1, np.int64)
    strength = np.zeros((len(values), examples), np.float32)
    for latent, (own, numbers) in enumerate(zip(values, rows, strict=True)):
        known = numbers >= 0
        _, first = np.unique(contexts[numbers[known]], return_index=True)
        taken = np.sort(first)[:examples]
        chosen[latent, : len(taken)] = numbers[known][taken]
        strength[latent, : len(taken)] = own[known][taken]
    return {"row": chosen, "value": strength}


def _window(position: np.ndarray, settings: Mapping[str, int]) -> np.ndarray:
    """(d_sae, examples, window) positions that an example shows: around it, or all patches."""
    if "patches" in settings:
        every = np.arange(settings["first"], settings["first"] + settings["patches"])
        return np.broadcast_to(every, (*position.shape, len(every)))
    return position[..., None] + np.arange(-settings["before"], settings["after"] + 1)


class _Lookup:
    """Rows of a store by context and position."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.length = int(columns["position"].max()) + 1
        key = columns["context"].astype(np.int64) * self.length + columns["position"]
        self.order = np.argsort(key)
        self.keys = key[self.order]

    def rows(self, context: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Row numbers, -1 for what the store does not hold."""
        wanted = context.astype(np.int64) * self.length + position
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        there = (self.keys[place] == wanted) & (position >= 0) & (position < self.length)
        return np.where(there, self.order[place], -1)


def _look_up(sae: Any, rows: EvaluatedRows, wanted: np.ndarray) -> np.ndarray:
    """Activation of each latent (first axis) on the rows `wanted` (d_sae, ...) of it; 0 where there is none."""
    flat = wanted.reshape(-1)
    order = np.argsort(flat, kind="stable")
    latent_of = np.arange(len(flat)) // (len(flat) // len(wanted))
    values = np.zeros(len(flat), np.float32)
    with torch.inference_mode():
        for batch in rows:
            numbers = batch.numbers
            begin, end = np.searchsorted(flat[order], [numbers[0], numbers[-1] + 1])
            pairs = order[begin:end]
            place = np.searchsorted(numbers, flat[pairs])
            there = numbers[np.minimum(place, len(numbers) - 1)] == flat[pairs]
            pairs, place = pairs[there], place[there]
            latents = sae.encode(batch.x)
            picked = latents[torch.from_numpy(place), torch.from_numpy(latent_of[pairs])]
            values[pairs] = picked.float().cpu().numpy()
    return values.reshape(wanted.shape)


def neighbours(directions: Tensor, count: int) -> dict[str, np.ndarray]:
    """The latents whose decoder rows (d_sae, d_in) point most alike: neighbours and cosines (d_sae, count)."""
    unit = torch.nn.functional.normalize(directions.detach().float(), dim=1)
    count = min(count, len(unit) - 1)
    indices, cosines = [], []
    size = max(1, _AT_ONCE // len(unit))
    for start in range(0, len(unit), size):
        part = unit[start : start + size] @ unit.t()
        own = torch.arange(len(part), device=part.device)
        part[own, own + start] = -2.0
        top = part.topk(count, dim=1)
        indices.append(top.indices.int().cpu().numpy())
        cosines.append(top.values.cpu().numpy())
    return {"neighbours": np.concatenate(indices), "cosines": np.concatenate(cosines)}


def logit_lens(model: Any, norm: Any, directions: Tensor, count: int) -> dict[str, np.ndarray]:
    """Tokens that each latent's decoder row raises and lowers most when it reaches the output alone.

    The row takes the place of the whole residual stream: final norm, then lm head, less what both give for
    zeros (nostalgebraist 2020, "the logit lens"; on decoder rows as in SAEDashboard and Neuronpedia). What
    later blocks do with it is left out.

    Args:
        model: a causal language model.
        norm: its final norm.
        directions: (d_sae, d_model).
        count: tokens each way.

    Returns:
        raised and lowered (d_sae, count) int32 token ids; raised_by and lowered_by, their logits' changes, float32.
    """
    head = model.get_output_embeddings()
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("raised", "raised_by", "lowered", "lowered_by")
    }
    with torch.inference_mode():
        rows = directions.detach().to(head.weight.dtype)
        nothing = head(norm(torch.zeros_like(rows[:1])))
        size = max(1, _AT_ONCE // nothing.shape[1])
        for part in rows.split(size):
            scores = head(norm(part)) - nothing
            for name, largest in (("raised", True), ("lowered", False)):
                top = scores.topk(count, dim=1, largest=largest)
                found[name].append(top.indices.int().cpu().numpy())
                found[f"{name}_by"].append(top.values.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}
