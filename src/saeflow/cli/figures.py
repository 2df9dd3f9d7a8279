"""Jobs that draw figures and write the report."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.cli.arguments import Key, Mark, Out, parse_json


def draw(
    figure: Annotated[str, typer.Argument(help="A key of saeflow.figures.FIGURES.")],
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    figures: Annotated[str, typer.Option(help="`figures`, as JSON.")],
    out: Out,
    key: Key = "",
) -> None:
    """Draw one figure from the tables."""
    from saeflow.figures import draw as draw_figure

    options = parse_json("--figures", figures)
    with provenance.job(out, name="draw", inputs=[tables], params=options, key=key) as job:
        draw_figure(figure, tables, options, job.path)


def report(
    names: Annotated[list[str], typer.Argument(help="Figures, in order.")],
    results: Annotated[Path, typer.Option(help="The results folder.")],
    out: Annotated[Path, typer.Option(help="Written: the report, one HTML file.")],
    page: Annotated[
        list[str] | None, typer.Option(help="Runs with a page of latent cards, to link to.")
    ] = None,
    mark: Mark = "",
    key: Key = "",
) -> None:
    """Write the report: tables, figures and where everything came from."""
    from saeflow.figures.report import write_report

    folders = [results / "figures" / name for name in names]
    pages = {run: results / "evaluations" / "latents" / run for run in page or []}
    write_report(results / "tables", folders, _records(results, folders), out, pages, mark)
    inputs = [results / "tables", *folders, *pages.values()]
    provenance.record_file(
        out, name="report", inputs=inputs, params={"names": names, "mark": mark}, key=key
    )


def _records(results: Path, figures: list[Path]) -> list[Path]:
    """The records of everything that the figures were made from."""
    seen: set[str] = set()
    links = (link for folder in figures for link in provenance.trace(folder, lambda _: None, seen))
    return sorted({provenance.record_path(Path(link.result)) for link in links})
