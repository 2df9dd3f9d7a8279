"""What an SAE does with single images: how many latents each uses, where concepts lie, and pictures of both.

Position 0 of an image is its CLS token, position 1 + i its i-th patch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from saeflow.evaluation.measure import Seen
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.rows import RowSelection, RowStatistics, selected_rows
from saeflow.files import write_json

DEFINITIONS = {
    "fvu_cls": "FVU over CLS tokens only, about their own mean; so for nmse_, cosine_ and l0_.",
    "fvu_patches": "FVU over patches only, about their own mean; so for nmse_, cosine_ and l0_.",
    "spearman_l0_objects": (
        "Spearman correlation of an image's mean L0 over its tokens with its number of objects (scenes)."
    ),
    "spearman_k_hat_objects": "the same for the k that the SAE allows.",
}
CARDS, CARD_FACTS = "cards.safetensors", "cards.json"
KINDS: dict[str, Literal["first", "rest"]] = {"cls": "first", "patches": "rest"}
_PER_KIND = ("fvu", "nmse", "cosine")
_DENSE = 0.1
_PART = 0.25
_MOST_PIXELS = 112
_BINS = 24
_SHOWN = 8
"""Images from the simplest to the most complex."""
_STRONGEST = 3
"""Concepts shown of each of them."""


class PerKind:
    """Reconstruction and L0 of CLS tokens and of patches, apart.

    Args:
        statistics: rows and mean of each kind, by its name in KINDS.
    """

    def __init__(self, statistics: Mapping[str, RowStatistics]) -> None:
        self.rebuilt = {kind: Reconstruction(held.mean) for kind, held in statistics.items()}
        self.l0 = dict.fromkeys(statistics, 0)

    def add(self, seen: Seen) -> None:
        first = torch.as_tensor(seen.column("position") == 0, device=seen.x.device)
        for kind, rebuilt in self.rebuilt.items():
            mine = first if kind == "cls" else ~first
            if bool(mine.any()):
                rebuilt.add(seen.x[mine], seen.x_hat[mine])
                self.l0[kind] += int(seen.l0[mine].sum())

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind, rebuilt in self.rebuilt.items():
            values = rebuilt.metrics()
            found |= {f"{name}_{kind}": values[name] for name in _PER_KIND}
            found[f"l0_{kind}"] = self.l0[kind] / rebuilt.rows
        return found


class PerImage:
    """Mean L0 and k of every image, over its tokens.

    Args:
        n_images: images of the split.
        objects: whether the store knows how many objects each has.
        among: of so many images, what every latent fires on is kept apart.
    """

    def __init__(self, n_images: int, *, objects: bool, among: int = 0) -> None:
        self.tokens, self.l0, self.k_hat = (np.zeros(n_images) for _ in range(3))
        self.labels = np.full(n_images, -1)
        self.objects = np.full(n_images, -1) if objects else None
        self.has_k = False
        self.energy: Any = 0.0  # (d_sae,) sum of squared activations of each latent
        self.among = among
        self.fires_on: Any = None  # (among, d_sae) tokens of each image that it fires on

    def add(self, seen: Seen) -> None:
        self.energy = self.energy + seen.latents.double().square().sum(0).cpu().numpy()
        near = np.flatnonzero(seen.column("context") < self.among)
        if len(near):
            if self.fires_on is None:
                self.fires_on = np.zeros((self.among, seen.latents.shape[1]), np.int32)
            fires = (seen.latents[torch.as_tensor(near, device=seen.x.device)] != 0).cpu().numpy()
            np.add.at(self.fires_on, seen.column("context")[near], fires)
        image = seen.column("context")
        np.add.at(self.tokens, image, 1)
        np.add.at(self.l0, image, seen.l0.cpu().numpy())
        self.labels[image] = seen.column("label")
        if seen.allowed is not None:
            self.has_k = True
            np.add.at(self.k_hat, image, seen.allowed.double().cpu().numpy())
        if self.objects is not None:
            self.objects[image] = seen.column("objects")

    @property
    def images(self) -> np.ndarray:
        """Numbers of the images that have tokens."""
        return np.flatnonzero(self.tokens)

    def metrics(self) -> dict[str, float]:
        if self.objects is None:
            return {}
        images = self.images
        found: dict[str, float] = {}
        for name, total in (("l0", self.l0), ("k_hat", self.k_hat)):
            value = correlation(total[images] / self.tokens[images], self.objects[images])
            if value is not None and (name == "l0" or self.has_k):
                found[f"spearman_{name}_objects"] = value
        return found

    def lines(self, most: int) -> list[dict[str, Any]]:
        """One line for each of the first images."""
        return [
            {
                "context": int(i),
                "label": int(self.labels[i]),
                "objects": None if self.objects is None else int(self.objects[i]),
                "l0": self.l0[i] / self.tokens[i],
                "k_hat": self.k_hat[i] / self.tokens[i] if self.has_k else None,
            }
            for i in self.images[:most]
        ]


class PerRow:
    """L0 and k of the first rows of the store, which are a random sample of it."""

    def __init__(self, rows: int) -> None:
        self.l0, self.k_hat = np.full(rows, np.nan), np.full(rows, np.nan)

    def add(self, seen: Seen) -> None:
        mine = seen.rows < len(self.l0)
        self.l0[seen.rows[mine]] = seen.l0.cpu().numpy()[mine]
        if seen.allowed is not None:
            self.k_hat[seen.rows[mine]] = seen.allowed.double().cpu().numpy()[mine]

    def metrics(self) -> dict[str, float]:
        return {}

    def lines(self, dimensions: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Correlations with the local intrinsic dimension, by estimator and neighbours.

        Args:
            dimensions: `ESTIMATOR-NEIGHBOURS` (rows,) and `norm` (rows,), of the same rows.
        """
        lines = []
        norm = dimensions["norm"]
        for name in sorted(set(dimensions) - {"norm"}):
            estimator, _, neighbours = name.partition("-")
            line: dict[str, Any] = {"estimator": estimator, "neighbours": int(neighbours)}
            dimension = dimensions[name]
            known = np.isfinite(dimension) & np.isfinite(self.l0)
            line |= {"rows": int(known.sum()), "dimension": float(dimension[known].mean())}
            for quantity, values in (("l0", self.l0), ("k_hat", self.k_hat)):
                held = known & np.isfinite(values)
                if held.any():
                    parts = values[held], dimension[held], norm[held]
                    line[f"spearman_{quantity}"] = correlation(*parts[:2])
                    line[f"partial_{quantity}"] = partial_correlation(*parts)
            lines.append(line)
        return lines


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where one side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b)[0])


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float | None:
    """Spearman's, with what the ranks of `given` explain linearly taken from both sides' ranks."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b, given)]
    a_rank, b_rank, g = (rank - rank.mean() for rank in ranks)
    if not (g @ g and a_rank @ a_rank and b_rank @ b_rank):
        return correlation(a, b)
    left, right = (rank - (rank @ g) / (g @ g) * g for rank in (a_rank, b_rank))
    scale = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / scale) if scale > 1e-9 * len(a) else None


# Pictures: concept cards, and images from the simplest to the most complex.


def write_cards(
    sae: Any,
    store: Any,
    selection: RowSelection,
    per_image: PerImage,
    fired: np.ndarray,
    pixels: np.ndarray,
    cover: np.ndarray | None,
    grid: tuple[int, int],
    name: Callable[[np.ndarray], list[tuple[str, float]]],
    settings: Mapping[str, Any],
    batch_size: int,
    device: str,
    folder: Path,
) -> None:
    """Pictures of an SAE's most used concepts and of its simplest to most complex images.

    Args:
        sae, store, selection, batch_size, device: as for `measure_rows`.
        per_image: of a first pass.
        fired: (d_sae,) rows on which each latent fired in it.
        pixels: (images, height, width, 3) uint8 of the split.
        cover: of scenes (images, down, across), -1 where a patch shows no object.
        grid: patches down and across.
        name: nearest text and its cosine of some latents; nothing where there are no texts.
        settings: `concepts`, `images` and `among` of evaluation.concept_cards.
        folder: written: cards.safetensors and cards.json.
    """
    among = per_image.images[per_image.images < settings["among"]]
    chosen = _chosen(per_image, fired, store.rows, settings["concepts"])
    order = among[np.argsort(per_image.l0[among] / per_image.tokens[among], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int)
    shown = order[places]
    tokens = grid[0] * grid[1] + 1
    activations = np.zeros((settings["among"], tokens, len(chosen)), np.float32)
    used = np.zeros((len(shown), tokens), np.int32)
    kept: dict[int, Tensor] = {}
    with torch.inference_mode():
        for rows, x in selected_rows(store, selection, batch_size, device):
            context = store.column("context", int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
            mine = np.flatnonzero(context < settings["among"])
            if not len(mine):
                continue
            position = store.column("position", int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
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
        card["firing_rate"] = float(fired[latent] / store.rows)
        if names:
            card["prompt"], card["prompt_cosine"] = names[number]
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
                "l0": per_image.l0[image] / per_image.tokens[image],
                "k_hat": per_image.k_hat[image] / per_image.tokens[image]
                if per_image.has_k
                else None,
                "objects": None if per_image.objects is None else int(per_image.objects[image]),
                "concepts": concepts,
            }
            for image, (_, concepts) in zip(shown, strongest, strict=True)
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
