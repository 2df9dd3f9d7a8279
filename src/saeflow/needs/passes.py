"""Cost of one context's way through a source's model, counted by running the model without memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import canonical_json
from saeflow.plan import Plan

FLOAT = 4
"""Bytes of a weight."""


@dataclass(frozen=True)
class Pass:
    """One context through a source's model."""

    flops: float
    """Up to the last hook point."""
    flops_whole: float
    weights: float
    """Bytes in float32."""
    widths: Mapping[str, int]
    rows: int
    """Rows that a context gives."""
    input_bytes: float = 0


def count_passes(plan: Plan, results: Path) -> dict[str, Pass]:
    """One context's way through the model of each source; see `one_pass`."""
    counted: dict[str, Pass] = {}
    found = {}
    for name in plan.sources:
        source = plan.params["sources"][name]
        alike = canonical_json({k: v for k, v in source.items() if k not in ("text", "images")})
        if alike not in counted:
            counted[alike] = one_pass(source, name, results)
        found[name] = counted[alike]
    return found


def one_pass(source: Mapping[str, Any], name: str, results: Path) -> Pass:
    """Count one context's way through a source's model.

    Args:
        source: its parameters.
        name: its name, for its folder and messages.
        results: the results folder, where its model may have been fetched.

    Raises:
        UserError: the model's config.json is not at hand.
    """
    if "model" not in source:
        widths = dict.fromkeys(source["hook_points"], int(source["d_in"]))
        return Pass(0, 0, 0, widths, 1)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.initialization import no_init_weights

    from saeflow.sources.architectures import architecture
    from saeflow.sources.hook_points import capture
    from saeflow.sources.layouts import VISION
    from saeflow.sources.structure import no_cache, structure_of
    from saeflow.sources.towers import image_output, pair

    config = _config(source["model"], name, results)
    image = None
    with FakeTensorMode(), no_init_weights():  # shapes only, no memory
        # Eager: its products are counted.
        model = architecture(config).from_config(config, attn_implementation="eager").eval()
        if "images" in source:
            image = structure_of(model, VISION).image
            assert image is not None
            size = pair(source["model"].get("image_size", image.size))
            inputs = torch.zeros(1, 3, *size)
        else:
            inputs = torch.zeros(1, source["context_length"], dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            found = capture(model, source["hook_points"], inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            model(inputs, **no_cache(model)) if image is None else image_output(model, inputs)
    widths = {point: x.shape[-1] for point, x in found.items()}
    positions = next(iter(found.values())).shape[1] if next(iter(found.values())).ndim > 2 else 1
    rows = positions - bool(source.get("skip_first"))
    if image is not None:
        rows = {"all": positions, "cls": 1, "patches": positions - image.prefix}[source["tokens"]]
    weights = sum(p.numel() for p in model.parameters()) * FLOAT
    input_bytes = inputs.numel() * (1 if image is not None else np.dtype(np.int32).itemsize)
    flops, flops_whole = (float(c.get_total_flops()) for c in (counter, whole))
    return Pass(flops, flops_whole, weights, widths, rows, input_bytes)


def _config(model: Mapping[str, Any], name: str, results: Path) -> Any:
    """Configuration of a model: by its pin, as fetched, from its folder, or the one file from the hub."""
    from transformers import AutoConfig

    if "trained" in model:
        from saeflow.sources.clip_training import clip_config

        return clip_config(model["trained"])
    from saeflow.shapes import pinned_config

    pinned = pinned_config(model)
    if pinned is not None:
        return AutoConfig.for_model(**pinned)
    fetched = results / "sources" / name / "model"
    if (fetched / "provenance.json").exists():
        from saeflow.sources.models import model_folder

        place = model_folder(fetched, weights=False)
    elif "folder" in model:
        place = Path(model["folder"])
    elif "hub" in model:
        from saeflow.sources import hub

        place = hub.config_file(model["hub"], model["revision"]).parent
    else:
        raise UserError(
            f"sources.{name}.model: its shape is known once it was fetched. Run `snakemake --cores 1 "
            f"{fetched}/provenance.json` first."
        )
    from saeflow.sources.models import config_in

    return config_in(place)
