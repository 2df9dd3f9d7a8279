"""Checks of a model's files before its weights are read: hook points on shapes alone, and the tokenizer's own tokens."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources.layouts import VISION, HookPoint
from saeflow.sources.loading import check_weight_files

logger = logging.getLogger(__name__)

_LENGTH = 8
"""Tokens of the context that a model of shapes alone is run on."""


def check_source_model(params: Mapping[str, Any], folder: Path) -> None:
    """Check what can be told of a source's model that was not fetched yet, where its files lie on this machine.

    Args:
        params: an entry of `sources`, with `model` and `hook_points`.
        folder: results/sources/NAME, which may hold the fetched model; fetching checks the same.

    Raises:
        UserError: no list of blocks, a place that a block lacks, a module that is not there, does not run or gives no tensor,
            a file of weights that is not whole, or a tokenizer without the tokens that begin and end a text.
    """
    model, record = params["model"], folder / "model" / "provenance.json"
    if record.is_file() and read_json(record).get("params", {}).get("model") == dict(model):
        return
    if "folder" in model:
        local = Path(model["folder"])
        check_structure(local, params["hook_points"])
        check_weight_files(local)
        begins = bool(params.get("prepend_bos"))
        check_ends(local, params["hook_points"], prepend_bos=begins, must_load=True)
    elif "hub" in model:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model["hub"], "config.json", revision=model["revision"])
        if isinstance(cached, str):
            check_structure(Path(cached).parent, params["hook_points"])


def check_structure(local: Path, hook_points: Iterable[str]) -> dict[str, str]:
    """Find a model's hook points in its structure before its weights are fetched; note what part of it is run.

    What cannot be built, or whose structure shapes alone do not tell, is checked when its weights are loaded.

    Args:
        local: folder with its config.json.
        hook_points: names such as `blocks.8.resid_post`.

    Raises:
        UserError: no list of blocks, a place that a block lacks, or a module that is not there, does not run or gives no
            tensor.
    """
    from saeflow.sources.architectures import part_of
    from saeflow.sources.hook_points import check_model
    from saeflow.sources.models import config_in
    from saeflow.sources.structure import UntoldStructureError, without_weights

    names = list(hook_points)
    try:
        config = config_in(local)
        model = without_weights(config)
    except UserError:
        return {}  # loading says more of it
    with suppress(UntoldStructureError):
        check_model(model, names)
        _run_on_shapes(model, [name for name in names if HookPoint.parse(name).module])
    return part_of(config)


def _run_on_shapes(model: Any, modules: list[str]) -> None:
    """Run a model of shapes alone up to some modules that are named by their path.

    Raises:
        UserError: a module does not run or gives no tensor.
    """
    import torch

    from saeflow.sources.hook_points import capture
    from saeflow.sources.towers import image_size

    fake: Any = next(model.parameters())
    for tower in ("", VISION):
        names = [name for name in modules if name.startswith(VISION) == bool(tower)]
        if not names:
            continue
        try:
            with fake.fake_mode, torch.no_grad():
                ids = torch.zeros(1, _LENGTH, dtype=torch.long)
                capture(model, names, torch.zeros(1, 3, *image_size(model)) if tower else ids)
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            # Shapes alone do not run it (mixtures of experts ask which experts have tokens); its weights will.
            logger.debug("%s: not run on shapes (%s)", type(model).__name__, error)


def check_ends(
    local: Path, hook_points: Iterable[str], *, prepend_bos: bool = False, must_load: bool = False
) -> None:
    """Check that a language model's tokenizer has the token that ends a text, and the one that begins it where it is used.

    Args:
        local: folder of the model.
        hook_points: those of a source; an image tower needs no tokenizer.
        prepend_bos: contexts begin with the tokenizer's BOS.
        must_load: refuse a tokenizer that cannot be read, too; else it is refused where it is used.

    Raises:
        UserError: the tokenizer has no such token.
    """
    from saeflow.sources.models import load_tokenizer
    from saeflow.sources.tokenizers import special_token

    if all(name.startswith(VISION) for name in hook_points):
        return
    try:
        tokenizer = load_tokenizer(local)
    except UserError:
        if must_load:
            raise
        return
    for name in ("bos", "eos") if prepend_bos else ("eos",):
        special_token(tokenizer, name)
