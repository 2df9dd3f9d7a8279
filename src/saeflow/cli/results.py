"""Commands on results: what they were made from, and whether they are as they were made."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.errors import UserError
from saeflow.provenance import RECORD
from saeflow.trace import rests_on, result_of
from saeflow.trace import trace as walk

REPORT = "report.html"


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
    """Check every file of every result against its record, and read every store through.

    Results that the report beside them does not rest on are named: parameters that are no longer there asked for them.
    """
    from saeflow.stores import verify as verify_store

    count, left_over = 0, 0
    for root in results or [Path("results")]:
        if not root.exists():
            raise UserError(f"{root}: no such file or folder. Give a result, or run the workflow.")
        within = rests_on(root / REPORT) if (root / f"{REPORT}.{RECORD}").exists() else None
        for result in provenance.results_under(root) or [result_of(root)]:
            provenance.check(result)
            for store in sorted(result.glob("*.zarr")):
                verify_store(store)
            count += 1
            if within is not None and result not in within:
                left_over += 1
                typer.echo(f"{result}: left over, {root / REPORT} does not rest on it.")
    rest = f", {left_over} of them left over from other parameters" if left_over else ""
    typer.echo(f"{count} results are as they were made{rest}.")
