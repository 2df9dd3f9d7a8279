"""Single images: active latents of each, places of concepts, and pictures of both.

Position 0 of an image is its CLS token, position 1 + i its i-th patch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from saeflow.evaluation.contexts import ContextMeans
from saeflow.evaluation.in_model import NearText
from saeflow.evaluation.measure import Result, Seen
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.rows import EvaluatedRows, RowStatistics
from saeflow.files import write_json
from saeflow.sources import ImageInputs

CARDS, CARD_FACTS = "cards.safetensors", "cards.json"
_PER_GROUP = ("fvu", "nmse", "cosine")
_DENSE = 0.1
_PART = 0.25
_MOST_PIXELS = 112
_BINS = 24
_SHOWN = 8
"""Images from the simplest to the most complex."""
_STRONGEST = 3
"""Concepts shown of each of them."""


class PerGroup:
    """Reconstruction and L0 of groups of rows, apart, such as CLS tokens and patches.

    Args:
        groups: by name, the positions of a context that a group holds.
        statistics: rows and mean of each group.
    """

    def __init__(
        self,
        groups: Mapping[str, Literal["first", "rest"]],
        statistics: Mapping[str, RowStatistics],
    ) -> None:
        self.groups = groups
        self.rebuilt = {name: Reconstruction(statistics[name].mean) for name in groups}
        self.l0 = dict.fromkeys(groups, 0)

    def update(self, seen: Seen) -> None:
        first = torch.as_tensor(seen.column("position") == 0)
        for name, rebuilt in self.rebuilt.items():
            mine = first if self.groups[name] == "first" else ~first
            if bool(mine.any()):
                there = mine.to(seen.x.device)
                rebuilt.add(seen.x[there], seen.x_hat[there])
                self.l0[name] += int(seen.l0[mine].sum())

    def result(self) -> Result:
        found: dict[str, float] = {}
        for group, rebuilt in self.rebuilt.items():
            values = rebuilt.metrics()
            found |= {f"{name}_{group}": values[name] for name in _PER_GROUP}
            found[f"l0_{group}"] = self.l0[group] / rebuilt.rows
        return Result(found)


class PerImage(ContextMeans):
    """Means of every image, with counts of how often each latent fires on it.

    Args:
        n_images: images of the split.
        columns: of the store, see ContextMeans.
        listed: see ContextMeans.
        among: of so many images, what every latent fires on is kept apart.
    """

    def __init__(self, n_images: int, columns: Any, listed: int = 0, among: int = 0) -> None:
        super().__init__(n_images, columns, listed)
        self.energy: Any = 0.0  # (d_sae,) sum of squared activations of each latent
        self.among = among
        self.fires_on: Any = None  # (among, d_sae) tokens of each image that it fires on

    def update(self, seen: Seen) -> None:
        super().update(seen)
        self.energy = self.energy + seen.latents.double().square().sum(0).cpu().numpy()
        near = np.flatnonzero(seen.column("context") < self.among)
        if len(near):
            if self.fires_on is None:
                self.fires_on = np.zeros((self.among, seen.latents.shape[1]), np.int32)
            fires = (seen.latents[torch.as_tensor(near, device=seen.x.device)] != 0).cpu().numpy()
            np.add.at(self.fires_on, seen.column("context")[near], fires)


def write_cards(
    sae: Any,
    rows: EvaluatedRows,
    per_image: PerImage,
    fired: np.ndarray,
    images: ImageInputs,
    name: Callable[[np.ndarray], list[NearText]],
    settings: Mapping[str, Any],
    folder: Path,
) -> None:
    """Pictures of an SAE's most used concepts and of its simplest to most complex images.

    Args:
        sae, rows: as for `measure_rows`.
        per_image: of a first pass.
        fired: (d_sae,) rows on which each latent fired in it.
        images: of the split.
        name: nearest text of some latents; nothing where there are no texts.
        settings: `concepts`, `images` and `among` of evaluation.concept_cards.
        folder: written: cards.safetensors and cards.json.
    """
    pixels, cover, grid = images.pixels, images.cover, images.grid
    n_rows = rows.store.rows
    among = per_image.contexts[per_image.contexts < settings["among"]]
    chosen = _chosen(per_image, fired, n_rows, settings["concepts"])
    order = among[np.argsort(per_image.l0[among] / per_image.tokens[among], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int)
    shown = order[places]
    tokens = grid[0] * grid[1] + 1
    activations = np.zeros((settings["among"], tokens, len(chosen)), np.float32)
    used = np.zeros((len(shown), tokens), np.int32)
    kept: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch in rows:
            x, context = batch.x, batch.column("context")
            mine = np.flatnonzero(context < settings["among"])
            if not len(mine):
                continue
            position = batch.column("position")
            latents = sae.encode(x[torch.as_tensor(mine, device=x.device)])
            context, position = context[mine], position[mine]
            activations[context, position] = latents[
                :, torch.as_tensor(chosen, device=x.device)
            ].cpu()
            for number, image in enumerate(shown):
                here = np.flatnonzero(context == image)
                if len(here):
                    own = latents[torch.as_tensor(here, device=x.device)].cpu()
                    used[number, position[here]] = (own != 0).sum(1)
                    held = kept.setdefault(number, torch.zeros(tokens, latents.shape[1]))
                    held[torch.from_numpy(position[here]).long()] = own
    arrays, cards = _cards(activations, chosen, pixels, grid, settings["images"])
    names = name(chosen)
    for number, (card, latent) in enumerate(zip(cards, chosen.tolist(), strict=True)):
        if cover is not None:
            strength = np.abs(activations[: len(cover), 1:, number])
            on = cover[: settings["among"]].reshape(len(strength), -1) >= 0
            card["on_objects"] = float((strength * on).sum() / max(strength.sum(), 1e-12))
        card["firing_rate"] = float(fired[latent] / n_rows)
        if names:
            card["prompt"], card["prompt_cosine"], card["prompt_shuffled"] = names[number]
    strongest = [_strongest(kept[number], grid) for number in range(len(shown))]
    arrays |= {
        "shown_pixels": _small(pixels[shown]),
        "shown_l0": used[:, 1:].reshape(-1, *grid),
        "shown_masks": np.stack([mask for mask, _ in strongest]),
    }
    covered = None if cover is None else float((cover[: settings["among"]] >= 0).mean())
    facts = {
        "covered": covered,
        "concepts": cards,
        "shown": [
            {
                "context": int(image),
                **{key: facts_of[key] for key in ("l0", "k_hat", "objects")},
                "concepts": concepts,
            }
            for image, (_, concepts) in zip(shown, strongest, strict=True)
            for facts_of in [per_image.line(image)]
        ],
    }
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / CARDS)
    write_json(folder / CARD_FACTS, facts)


def _chosen(per_image: PerImage, fired: np.ndarray, rows: int, count: int) -> np.ndarray:
    """The latents with the largest sum of squared activations among those that look at a part of an image.

    These fire on at most _DENSE of all tokens and, on average over the images they fire on, on at most
    _PART of the tokens; where there are too few of them, any that fire.
    """
    rate, energy = fired / rows, per_image.energy
    images = np.maximum((per_image.fires_on > 0).sum(0), 1)
    part = per_image.fires_on.sum(0) / images / max(per_image.tokens.max(), 1)
    usable = np.flatnonzero((rate > 0) & (rate <= _DENSE) & (part <= _PART))
    usable = usable if len(usable) >= count else np.flatnonzero(rate > 0)
    return usable[np.argsort(-energy[usable], kind="stable")][:count]


def _cards(
    activations: np.ndarray,
    chosen: np.ndarray,
    pixels: np.ndarray,
    grid: tuple[int, int],
    n_images: int,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Top images, masks and histogram of each concept; its activations are (images, tokens, concepts)."""
    cards, tops, masks = [], [], []
    for number, latent in enumerate(chosen.tolist()):
        own = activations[..., number]
        patches = own[:, 1:] if own[:, 1:].any() else own[:, :1].repeat(own.shape[1] - 1, 1)
        best = np.argsort(-np.abs(patches).max(1), kind="stable")[:n_images]
        tops.append(_small(pixels[best]))
        masks.append(np.abs(patches[best]).reshape(-1, *grid))
        positive = np.abs(own[own != 0])
        counts, edges = np.histogram(positive, bins=_BINS) if len(positive) else ([], [])
        cards.append(
            {
                "latent": latent,
                "images": best.tolist(),
                "histogram": np.asarray(counts).tolist(),
                "edges": np.asarray(edges).tolist(),
            }
        )
    return {"pixels": np.stack(tops), "masks": np.stack(masks)}, cards


def _strongest(latents: Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """(concepts, down, across) where an image's strongest concepts lie, and which they are."""
    total = latents[1:].abs().sum(0) if latents[1:].any() else latents.abs().sum(0)
    best = total.topk(min(_STRONGEST, len(total))).indices
    mask = latents[1:, best].abs().t().reshape(len(best), *grid)
    return mask.numpy(), best.tolist()


def _small(pixels: np.ndarray) -> np.ndarray:
    """Every n-th pixel, so that no side is above _MOST_PIXELS."""
    step = -(-max(pixels.shape[1:3]) // _MOST_PIXELS)
    return np.asarray(pixels[:, ::step, ::step])
