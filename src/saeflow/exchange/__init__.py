"""SAEs to and from other libraries' files (SAELens, dictionary_learning), to the Hugging Face hub, and for other benchmarks."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from saeflow.errors import UserError
from saeflow.exchange import dictionary_learning, saelens
from saeflow.exchange.adapter import adapt
from saeflow.exchange.hook_names import ours, theirs
from saeflow.exchange.plain import Plain, plain_of, sae_of
from saeflow.saes.files import load, read_config, save

__all__ = [
    "FORMATS",
    "Plain",
    "adapt",
    "check_import",
    "export_sae",
    "import_sae",
    "plain_of",
    "sae_of",
]

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}
HUB = "hub"
DASHBOARDS = ("sae_dashboard", "neuronpedia")
"""Formats of latents, written from a page of latent cards."""
logger = logging.getLogger(__name__)


def export_sae(
    sae: Path, library: str, folder: Path, store: Any = None, evaluation: Path | None = None
) -> dict[str, Any]:
    """Write a trained SAE as another library's files, or as a folder for the Hugging Face hub.

    Args:
        sae: its folder; for DASHBOARDS that of its page of latent cards.
        library: one of FORMATS, hub, or one of DASHBOARDS.
        folder: an existing one that gets the files.
        store: held-out activations to calibrate a threshold on, for variants with a k for each input.
        evaluation: folder of the SAE's metrics, for the hub's model card.

    Returns:
        What a calibrated threshold costs, see `calibrate`; nothing where the SAE is exported as it is.

    Raises:
        UserError: an unknown library, or a variant that it has no place for.
    """
    if library == HUB:
        from saeflow.exchange import hub

        hub.write(sae, evaluation, folder)
        return {}
    if library in DASHBOARDS:
        from saeflow.exchange import dashboards

        dashboards.write(sae, library, folder)
        return {}
    config = read_config(sae)
    about: dict[str, Any] = {
        key: config[key] for key in ("name", "source", "hook_point") if key in config
    }
    names = theirs(config.get("hook_point", ""))
    if not names and "hook_point" in config:
        logger.warning(
            "%s: other libraries have no name for its hook point; the config says hook_point: %s, which they do not read.",
            sae,
            config["hook_point"],
        )
    about |= names
    trained = load(sae)
    cost: dict[str, Any] = {}
    try:
        if store is None:
            plain = plain_of(trained)
        else:
            from saeflow.exchange.calibration import calibrate

            plain, cost = calibrate(trained, store)
            about["calibrated"] = cost
    except UserError as error:
        raise UserError(f"{sae}: {error}") from None
    _format(library).write(plain, folder, {"made_by": "saeflow", **about})
    return cost


def import_sae(folder: Path, library: str, about: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write another library's SAE as one of saeflow's, which encodes and decodes the same.

    Args:
        folder: what the library saved.
        library: one of FORMATS.
        about: name, entry, source, hook_point and seed, which say what it is evaluated on.
        out: an existing folder that gets the SAE.

    Returns:
        Its variant, d_in and d_sae, and its k, None for a variant without one.

    Raises:
        UserError: an unknown library, an SAE that is damaged, incomplete or of an unknown kind, or one of
            another hook point.
    """
    check_import(folder, library, about["hook_point"])
    variant, options, sae = sae_of(_format(library).read(folder))
    config = {
        "variant": variant, "options": options, "d_in": sae.d_in, "d_sae": sae.d_sae, "scale": None,
        "training": {"tokens": None}, "imported": library, **about,
    }  # fmt: skip
    save(sae.state_dict(), out, config)
    return {key: config[key] for key in ("variant", "d_in", "d_sae")} | {"k": options.get("k")}


def check_import(folder: Path, library: str, hook_point: str) -> None:
    """Check what another library's config says of an SAE, without its weights.

    Args:
        folder: what the library saved.
        library: one of FORMATS.
        hook_point: where the SAE is evaluated.

    Raises:
        UserError: an unknown library, a config that saeflow has no place for, or one of another hook point.
    """
    facts = _format(library).facts(folder)
    try:
        named = ours(facts)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if named is None and (other := facts.get("hook_name") or facts.get("submodule_name")):
        logger.warning(
            "%s: its config says that it is of %s, a name that saeflow cannot compare with %s.",
            folder,
            other,
            hook_point,
        )
    if named is not None and named != hook_point:
        raise UserError(
            f"{folder}: expected an SAE of {hook_point}, found one that its config says is of {named}. "
            "Evaluate it on a store of its own hook point."
        )


def _format(library: str) -> ModuleType:
    if library not in FORMATS:
        raise UserError(
            f"library: expected one of {', '.join(FORMATS)} (to export: or {', '.join((HUB, *DASHBOARDS))}), found {library!r}."
        )
    return FORMATS[library]
