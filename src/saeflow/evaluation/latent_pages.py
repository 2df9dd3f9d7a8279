"""Arrays and facts that a page of latent cards shows of one trained SAE."""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.evaluation.latents import BINS, LOWEST, logit_lens, write_latents
from saeflow.evaluation.setup import Setup
from saeflow.sources import ImageInputs

_LENS = 6  # tokens each way
_PICTURE = 96  # pixels across


def collect_latents(
    sae: Any,
    config: Mapping[str, Any],
    setup: Setup,
    settings: Mapping[str, int],
    folder: Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Collect what the page of latent cards shows.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        setup: of the source and hook point it was trained on.
        settings: evaluation.latents of the parameters.
        folder: gets latents.safetensors.

    Returns:
        The arrays of `write_latents`, and the facts that `write_page` takes.

    Raises:
        UserError: the SAE was trained on other activations, or on some that no model made.
    """
    setup.check_fits(config)
    sae = sae.to(setup.device).eval()
    facts: dict[str, Any] = {
        "run": config["name"], "d_sae": config["d_sae"], "bins": BINS, "lowest": LOWEST,
    }  # fmt: skip
    lens = None
    if (images := setup.inputs.images) is not None:
        window = {"patches": images.patches, "first": images.first, **settings}
        facts |= _of_images(images)
    else:
        lens, more = _of_words(sae, setup)
        facts |= more
        window = {key: value for key, value in settings.items() if key != "contexts"}
    tokens = setup.inputs.tokens("evaluation")
    return write_latents(sae, setup.rows, tokens, window, folder, lens), facts


def _of_words(sae: Any, setup: Setup) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:
    """The logit lens where decoder rows reach the lm head, and how tokens read."""
    from saeflow.sources.heads import final_norm, has_head
    from saeflow.sources.hook_points import HookPoint
    from saeflow.sources.models import load_tokenizer
    from saeflow.sources.structure import structure_of
    from saeflow.sources.tokenizers import token_texts

    if setup.in_model is None or not setup.kind.has_tokens:
        raise UserError(
            f"evaluation.latents.runs: expected SAEs of a model's activations, found {setup.source}, which has "
            "no model. Take another run."
        )
    assert setup.folders.model is not None
    model, tokenizer = setup.in_model.model, load_tokenizer(setup.folders.model)
    lens = None  # for rows that are no part of the residual stream, or have no way to logits
    is_in_stream = HookPoint.parse(setup.hook_point).is_in_stream
    if is_in_stream and has_head(model) and structure_of(model).final_norm is not None:
        lens = logit_lens(model, final_norm(model), sae.directions(), _LENS)
    inside = token_texts(tokenizer)  # which has none for special ones
    return lens, {"unit": "tokens", "strings": lambda t: inside(t) or tokenizer.decode([t])}


def _of_images(images: ImageInputs) -> dict[str, Any]:
    """Pictures with their classes, and the grid of patches that a page shows of each."""
    grid = images.grid if images.first else (1, 1)
    return {
        "unit": "tokens of images", "pictures": partial(_png, images.pixels), "titles": images.title,
        "grid": list(grid), "first": images.first,
    }  # fmt: skip


def _png(pixels: np.ndarray, image: int) -> bytes:
    """One of (images, height, width, 3) uint8 as a PNG file, at most _PICTURE pixels across."""
    from PIL import Image

    held = io.BytesIO()
    picture = Image.fromarray(pixels[image])
    picture.thumbnail((_PICTURE, _PICTURE))
    picture.save(held, "PNG")
    return held.getvalue()
