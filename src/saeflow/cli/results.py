"""Commands on results: what they were made from, and whether they are as they were made."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.errors import UserError
from saeflow.trace import result_of
from saeflow.trace import trace as walk


def trace(
    file: Annotated[Path, typer.Argument(help="A result: a figure, table, SAE, store.")],
) -> None:
    """Print what a result was made from, down to models and data, and check every digest."""
    from saeflow.sources import external_digest

    for link in walk(file, external_digest):
        rest = "(above)" if link.seen else link.facts
        typer.echo(f"{'  ' * link.depth}{link.result}  [{link.job} {link.digest[:12]}]  {rest}")
    typer.echo(f"{file}: every link holds.")


def verify(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Results; default: all of results/.")
    ] = None,
) -> None:
    """Check every file of every result against its record, and read every store through."""
    from saeflow.stores import verify as verify_store

    count = 0
    for root in results or [Path("results")]:
        if not root.exists():
            raise UserError(f"{root}: no such file or folder. Give a result, or run the workflow.")
        for result in provenance.results_under(root) or [result_of(root)]:
            provenance.check(result)
            for store in sorted(result.glob("*.zarr")):
                verify_store(store)
            count += 1
    typer.echo(f"{count} results are as they were made.")
