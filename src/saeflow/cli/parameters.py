"""Commands on a parameter file: check it, plan its run, rehearse it."""

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from saeflow.config import ROOT, load_params
from saeflow.errors import UserError
from saeflow.plan import Plan


def validate(
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    """Check a parameter file, and print what it asks for."""
    from saeflow.config.explain import counted
    from saeflow.preflight import device_problem, warnings

    plan = _checked(params)
    values = plan.params
    for warning in warnings(plan):
        logging.getLogger(__name__).warning("%s: %s", params, warning)
    if problem := device_problem(values["runtime"]):  # the jobs may run on another machine
        logging.getLogger(__name__).warning("%s: %s", params, problem)
    imported = f" and {len(plan.imports)} of other libraries" if plan.imports else ""
    typer.echo(
        f"{params}: {counted(len(plan.sources), 'source')}, {counted(len(plan.stores), 'store')}, "
        f"{counted(len(plan.runs), 'SAE')}{imported}, {counted(len(values['figures']['names']), 'figure')}."
    )


def _checked(path: Path) -> Plan:
    """The plan of a parameter file that a run would take."""
    from saeflow.preflight import check_inputs, check_saes, checked_plan

    values = load_params(path)
    try:
        plan = checked_plan(values)
        check_inputs(plan)
        check_saes(plan)
    except UserError as error:
        raise error.within(path) from None
    return plan


def parameters(
    key: Annotated[
        str,
        typer.Argument(
            help="The start of a key, such as evaluation.bootstrap; or a variant, for its options."
        ),
    ] = "",
    markdown: Annotated[bool, typer.Option(help="Print the page docs/parameters.md.")] = False,
) -> None:
    """Describe the keys of a parameter file: meaning, values, unit, default."""
    from saeflow.config.describe import as_markdown, as_text

    typer.echo(as_markdown() if markdown else as_text(key), nl=not markdown)


def plan(
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
    rates: Annotated[
        list[Path] | None,
        typer.Option(
            help="What a machine does in a second (several: a column each); default: this CPU's, as `make bench` "
            "measures it, and one H200's."
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Where fetched models lie.")] = Path("results"),
) -> None:
    """Print what a run will need: jobs, rows, disk, memory and hours."""
    from saeflow.needs import Needs, Rates, as_text, count_passes

    folder = ROOT / "benchmarks" / "results"
    machines = rates or [folder / "rates.yaml", folder / "rates-h200.yaml"]
    planned = _checked(params)
    passes = count_passes(planned, results)
    needs = [Needs(planned, Rates.read(path), passes) for path in machines]
    here = next(path for path in (results, *results.absolute().parents) if path.exists())
    typer.echo(as_text(*needs, free=shutil.disk_usage(here).free))


def rehearse(
    params: Annotated[list[Path], typer.Argument(help="Parameter files.")],
    out: Annotated[
        Path, typer.Option(help="Written: a folder of each, with its own results and report.")
    ] = Path("rehearsals"),
    cores: Annotated[int, typer.Option(min=0, help="CPU cores for the jobs; 0: all of them.")] = 0,
    every_run: Annotated[
        bool,
        typer.Option(
            help="Train every run, not only the first and the last value of each sweep of numbers."
        ),
    ] = False,
) -> None:
    """Run a parameter file's whole workflow in minutes: small random models, local data, everything scaled down."""
    from saeflow.rehearsal import RehearsalFailed, stage
    from saeflow.rehearsal import rehearse as rehearse_one

    if len({path.stem for path in params}) < len(params):
        raise UserError("params: expected files of different names, found one twice.")
    for path in params:
        load_params(path)  # a mistake in any is said before minutes are spent on the others
    cores = cores or len(os.sched_getaffinity(0))
    with stage() as environment:
        for path in params:
            try:
                said = rehearse_one(path, out / path.stem, cores, environment, every_run=every_run)
            except UserError as error:
                raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
            except RehearsalFailed as failure:
                sys.stderr.write(f"error: {path}: {failure}\n")
                raise typer.Exit(1) from None
            typer.echo(said)
