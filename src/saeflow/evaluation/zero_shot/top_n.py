"""Concepts that an image is left with: each class's n most frequent ones, under two protocols.

A class's concepts are ranked by how many tokens of its images they fire on. `paper` (arXiv:2604.14925 and
its released code) ranks on the images that are scored, counts activations above 0.2, and leaves each image
the concepts of its own, true class. `leak_free` ranks on training images, counts activations that are not
0, and gives every image the same concepts, the union of all classes' top n.

With `permuted` labels, images bear the labels of others, and nothing can be known about them. Leak-free
accuracy (concepts ranked with permuted labels too) must be at chance. The paper's protocol then shows of
each image the concepts of a class that it is not of; accuracy above chance is what the mask itself gives
away.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.evaluation.zero_shot.labelled_sets import LabelledSets
from saeflow.operators import SparseLatents

COUNTS = (1, 5, 10, 50)
"""n of the top-n protocols; beside them `all` concepts."""
PAPER_THRESHOLD = 0.2


@dataclass(frozen=True)
class Setting:
    """One way to leave an image a few concepts.

    Attributes:
        protocol: paper, leak_free; all: no concept is left out.
        labels: true, permuted.
        concepts: on: only the top n are left; off: all but these.
        n: None: all.
    """

    protocol: str
    labels: str
    concepts: str
    n: int | None


@dataclass(frozen=True)
class Ranks:
    """Scores that decide which concepts are a class's own.

    Attributes:
        counts: by split and labels, such as `train-true`: (classes, d_sae) tokens that a concept fires on.
        permuted: (test images,) permuted labels.
        d_sae: number of latents.
    """

    counts: Mapping[str, Tensor]
    permuted: Tensor
    d_sae: int


def rank(sets: LabelledSets, sae: Any, name: str, n_classes: int, spool: Path) -> Ranks:
    """Encode every image of a set once: count what fires for each class, keep the test images' latents.

    Args:
        sets: holds the set.
        sae: with `encode`, on the device of the sets.
        name: of the set.
        n_classes: of the set.
        spool: gets the latents of the test images, see `spooled`.
    """
    counts: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        every = sets.labels(name, split)
        permuted = every[torch.randperm(len(every), generator=generator)]
        start = 0
        for number, parts in enumerate(sets.batches(name, split)):
            rows = sets.rows_of(parts)
            dense = sae.encode(rows.reshape(-1, rows.shape[-1]))
            latents = SparseLatents.from_dense(dense)
            n_images = len(rows)
            image_of = latents.rows // rows.shape[1]
            fires = latents.values > PAPER_THRESHOLD if split == "test" else latents.values != 0
            kinds = {"true": every} | ({"permuted": permuted} if split == "train" else {})
            for kind, of_images in kinds.items():
                own = of_images[start : start + n_images].to(image_of.device)[image_of[fires]]
                flat = own * dense.shape[1] + latents.columns[fires]
                counted = torch.bincount(flat, minlength=n_classes * dense.shape[1])
                key = f"{split}-{kind}"
                counts[key] = counts.get(key, 0) + counted.cpu()
            start += n_images
            if split == "test":
                save_file(
                    {
                        "offsets": latents.offsets.cpu(),
                        "columns": latents.columns.to(torch.int32).cpu(),
                        "values": latents.values.cpu(),
                    },
                    spool / f"{number:05d}.safetensors",
                )
    d_sae = dense.shape[1]
    shaped = {key: count.view(n_classes, d_sae) for key, count in counts.items()}
    return Ranks(shaped, permuted, d_sae)  # of the test images, which come last


def spooled(
    sets: LabelledSets, name: str, spool: Path, d_sae: int
) -> Iterator[tuple[dict[str, Tensor], SparseLatents]]:
    """The test images of a set, some at a time, with the latents that `rank` kept of them."""
    for number, parts in enumerate(sets.batches(name, "test")):
        held = load_file(spool / f"{number:05d}.safetensors", device=sets.device)
        latents = SparseLatents(held["offsets"], held["columns"].long(), held["values"], d_sae)
        yield parts, latents


def top_concepts(counts: Tensor, n: int) -> Tensor:
    """(classes, d_sae) bool: each class's n most frequent concepts, ties to the lower index.

    Concepts that never fire for a class are none of its own.
    """
    order = counts.sort(dim=1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(counts, dtype=torch.bool)
    mask.scatter_(1, order, True)
    return mask & (counts > 0)


def masks(ranks: Ranks) -> dict[Setting, Tensor]:
    """The concepts that each setting leaves on: (classes, d_sae) by true class, or (1, d_sae) for every image."""
    found: dict[Setting, Tensor] = {}
    for labels in ("true", "permuted"):
        for n in COUNTS:
            paper = top_concepts(ranks.counts["test-true"], n)
            shared = top_concepts(ranks.counts[f"train-{labels}"], n).any(0, keepdim=True)
            for protocol, mask in (("paper", paper), ("leak_free", shared)):
                for concepts in ("on", "off") if labels == "true" else ("on",):
                    found[Setting(protocol, labels, concepts, n)] = mask
    return found


def kept(latents: SparseLatents, mask: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """(count,) 1 where the mask leaves a latent on, else 0."""
    if len(mask) == 1:
        return mask[0][latents.columns].to(latents.values.dtype)
    image_of = latents.rows // tokens
    own = labels.to(image_of.device)[image_of]
    return mask[own, latents.columns].to(latents.values.dtype)
