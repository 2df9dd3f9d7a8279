"""SAEs to and from other libraries' files: SAELens and dictionary_learning."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from saeflow.errors import UserError
from saeflow.exchange import dictionary_learning, saelens
from saeflow.exchange.plain import Plain, plain_of, sae_of
from saeflow.saes.files import load, read_config, save

__all__ = ["FORMATS", "Plain", "export_sae", "import_sae", "plain_of", "sae_of"]

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}


def export_sae(sae: Path, library: str, folder: Path) -> None:
    """Write a trained SAE as another library's files.

    Args:
        sae: its folder.
        library: one of FORMATS.
        folder: an existing one that gets the files.

    Raises:
        UserError: an unknown library, or a variant that it has no place for.
    """
    config = read_config(sae)
    about: dict[str, Any] = {
        key: config[key] for key in ("name", "source", "hook_point") if key in config
    }
    try:
        plain = plain_of(load(sae))
    except UserError as error:
        raise UserError(f"{sae}: {error}") from None
    _format(library).write(plain, folder, {"made_by": "saeflow", **about})


def import_sae(folder: Path, library: str, about: Mapping[str, Any], out: Path) -> None:
    """Write another library's SAE as one of saeflow's, which encodes and decodes the same.

    Args:
        folder: what the library saved.
        library: one of FORMATS.
        about: name, entry, source, hook_point and seed, which say what it is evaluated on.
        out: an existing folder that gets the SAE.

    Raises:
        UserError: an unknown library, or an SAE that is damaged, incomplete or of an unknown kind.
    """
    variant, options, sae = sae_of(_format(library).read(folder))
    config = {
        "variant": variant, "options": options, "d_in": sae.d_in, "d_sae": sae.d_sae, "scale": 1.0,
        "training": {"tokens": None}, "imported": library, **about,
    }  # fmt: skip
    save(sae.state_dict(), out, config)


def _format(library: str) -> ModuleType:
    if library not in FORMATS:
        raise UserError(f"library: expected one of {', '.join(FORMATS)}, found {library!r}.")
    return FORMATS[library]
