"""Commands of a first run: write a parameter file for the user's own data, run the workflow in the user's folder."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from saeflow.config import ROOT, read_yaml
from saeflow.errors import UserError
from saeflow.installed import interpreter


def init(
    folder: Annotated[Path, typer.Argument(help="Written: FOLDER/params.yaml.")],
    model: Annotated[
        str,
        typer.Option(
            help="A folder that save_pretrained wrote, or OWNER/NAME[@COMMIT] of the hub."
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of text (.txt, .jsonl, .parquet) or a folder of them; several times for several."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of images, one subfolder a class, for CLIP.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="OWNER/NAME[@COMMIT] of a data set of the hub, text or images.")
    ] = "",
    column: Annotated[
        str, typer.Option(help="The column of text or images; default: text or image.")
    ] = "",
    encoding: Annotated[
        str,
        typer.Option(
            help="Of the files of text, such as latin-1; default: UTF-8, or what a byte order mark says."
        ),
    ] = "",
    hook_point: Annotated[
        str,
        typer.Option(
            help="Default: two thirds up a language model, the last block but one of CLIP."
        ),
    ] = "",
) -> None:
    """Write a short parameter file for your own model and data."""
    from saeflow.starter import Asked, write_first

    asked = Asked(model, tuple(text or ()), images, dataset, column, hook_point, encoding)
    typer.echo(write_first(asked, folder))
    typer.echo(
        f"Next: cd {folder} && saeflow run. The report will be {folder / 'results/report.html'}."
    )


def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ARGUMENTS]", help="For snakemake: targets, -n for a list of the jobs, ..."
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="The folder with params.yaml, where results go.")
    ] = Path(),
    params: Annotated[
        Path | None, typer.Option(help="Another parameter file than FOLDER/params.yaml.")
    ] = None,
    cores: Annotated[int, typer.Option(min=0, help="CPU cores for the jobs; 0: all of them.")] = 0,
) -> None:
    """Run the workflow of a parameter file in a folder of your own: snakemake, with its exit code."""
    file = params or folder / "params.yaml"
    if importlib.util.find_spec("snakemake") is None:
        raise UserError(
            "run: expected Snakemake, found none. Install it: pip install 'saeflow[workflow]'."
        )
    if not file.is_file():
        raise UserError(
            f"{file}: no such parameter file. Write one: saeflow init {folder} --model ..."
        )
    read_yaml(file)  # names the place of what is no YAML, which Snakemake does not
    python = interpreter()
    command = [
        python, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder),
        "--configfile", str(file), "--workflow-profile", str(ROOT / "profiles" / "default"),
        "--cores", str(cores or "all"), *(arguments or ()),
    ]  # fmt: skip
    os.execv(python, command)
