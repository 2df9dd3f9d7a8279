"""Commands that pass SAEs to other libraries and take theirs over."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.cli.arguments import Key, Out
from saeflow.config import IMPORTED
from saeflow.errors import UserError
from saeflow.files import file_digest

Library = Annotated[str, typer.Option(help="saelens or dictionary_learning.")]


def export(
    sae: Annotated[
        Path,
        typer.Argument(
            help="Folder of a trained SAE; for sae_dashboard and neuronpedia of its page of latent cards."
        ),
    ],
    library: Annotated[
        str,
        typer.Option(
            help="saelens, dictionary_learning, hub; latents: sae_dashboard, neuronpedia."
        ),
    ],
    out: Out,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Held-out store (SOURCE/evaluation/HOOK_POINT.zarr), to calibrate a threshold on."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of its metrics, for the hub's model card.")
    ] = None,
) -> None:
    """Write a trained SAE as another library's files, or as a folder for the Hugging Face hub."""
    from saeflow.exchange import export_sae
    from saeflow.stores import open_store

    if not sae.is_dir():
        raise UserError(f"{sae}: no such folder. Give one that `saeflow run` made, below results/.")
    held_out = None if store is None else open_store(store)
    inputs = [sae, *filter(None, [store and store.parent, evaluation])]
    params = {"library": library}
    with provenance.job(out, name="export", inputs=inputs, params=params) as job:
        cost = export_sae(sae, library, job.path, held_out, evaluation)
        job.details["calibrated"] = cost or None
    typer.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if cost:
        typer.echo(
            f"one threshold, {cost['threshold']:.4g}, in the place of a k for each input: FVU {cost['fvu_own']:.4f} "
            f"becomes {cost['fvu_exported']:.4f}, L0 {cost['l0_mean_own']:.2f} {cost['l0_mean_exported']:.2f}"
        )


def push(
    folder: Annotated[Path, typer.Argument(help="What `saeflow export --library hub` wrote.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[
        bool, typer.Option(help="Whether a repository that is made can be seen by its owner alone.")
    ] = True,
) -> None:
    """Upload an exported SAE to the Hugging Face hub; the token is the hub client's (HF_TOKEN)."""
    from saeflow.exchange.hub import push as push_folder

    typer.echo(push_folder(folder, repository, is_private=private))


def import_(
    folder: Annotated[Path, typer.Argument(help="What the other library saved.")],
    library: Library,
    store: Annotated[str, typer.Option(help="SOURCE/HOOK_POINT it is evaluated on.")],
    out: Out,
    name: Annotated[
        str,
        typer.Option(help="Its run's name; default: SOURCE/HOOK_POINT/FOLDER/imported-LIBRARY."),
    ] = "",
    key: Key = "",
) -> None:
    """Take over another library's SAE, so that `saeflow evaluate` and `saeflow.load` know it."""
    from saeflow.exchange import import_sae

    source, _, hook_point = store.partition("/")
    if not (source and hook_point):
        raise UserError(f"--store: expected SOURCE/HOOK_POINT, found {store!r}.")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give what {library} saved.")
    run = name or f"{store}/{out.name}/{IMPORTED}{library}"
    about = {
        "name": run, "entry": run.split("/")[2], "source": source, "hook_point": hook_point, "seed": 0,
    }  # fmt: skip
    external = {str(path): file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    params = {"library": library, "store": store}
    with provenance.job(out, name="import", params=params, external=external, key=key) as job:
        found = import_sae(folder, library, about, job.path)
        job.details["notes"] = found
    typer.echo(
        f"{out}: {found['variant']}, {found['d_sae']} latents of {found['d_in']} inputs, taken over from {library}"
    )
