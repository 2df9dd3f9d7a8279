"""A first parameter file for the user's own model and data, with sizes that fit the data and this machine."""

from pathlib import Path

import yaml

from saeflow.config import validate
from saeflow.errors import UserError
from saeflow.files import atomic_file
from saeflow.plan import Plan
from saeflow.shapes import config_shape
from saeflow.sources.layouts import check_shape
from saeflow.starter.asked import Asked
from saeflow.starter.data import count_contexts, source_of
from saeflow.starter.model import read_model
from saeflow.starter.sizes import fit_rows, hours_of, render

__all__ = ["Asked", "write_first"]

PARAMS = "params.yaml"


def write_first(asked: Asked, folder: Path) -> str:
    """Write FOLDER/params.yaml, which `saeflow run` takes.

    Returns:
        What was written, in one line.

    Raises:
        UserError: the file is there already, or the model or the data cannot be used.
    """
    path = folder / PARAMS
    if path.exists():
        raise UserError(f"{path}: it is there already. Edit it, or give another folder.")
    model = read_model(asked)
    of_images = f"vision.blocks.{max(0, model.n_blocks - 2)}.resid_post"
    of_text = f"blocks.{2 * model.n_blocks // 3}.resid_post"
    hook_point = asked.hook_point or (of_images if model.is_image else of_text)
    check_shape(config_shape(model.folder / "config.json"), [hook_point], asked.model)
    source = source_of(asked, model, hook_point)
    most, whole = fit_rows(source, model, folder)
    contexts = count_contexts(source, whole, model, most)
    text = render(source, model, contexts, most)
    plan = Plan(validate(yaml.safe_load(text)))
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
    return (
        f"{path}: {len(plan.runs)} SAEs at {hook_point} of {asked.model}, "
        f"about {max(1, round(60 * hours_of(plan)))} min by `saeflow plan`."
    )
