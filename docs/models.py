"""Write docs/models.md: families of causal language models of transformers with the proof of their hook points.

python -m docs.models           # all families, about a quarter of an hour on one core
python -m docs.models gpt2 phi  # writes the page with these families alone
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from docs.families import FAMILIES, tiny_family

from saeflow.errors import UserError
from saeflow.sources.hub import last_line

PAGE = Path(__file__).with_name("models.md")
_HEAD = """# Models

saeflow finds the hook points of a causal language model in the model itself: it follows each block's output back through
sums to the block's input. No family has a line of code. This page is written by `python -m docs.models [FAMILY ...]`: it
builds {shown} of the {all} families that transformers {version} has for causal language models, at tiny size with random weights, and
proves their hook points. Before a model's first activation is stored, the same proof runs on that model.

- **places**: what `blocks.N.PLACE` can name. All families that work have `resid_pre` and `resid_post`.
- **next**: block outputs that are the next block's input, bit for bit.
- **sum**: blocks whose output is the sum of their input and of what their parts add.
- **library**: blocks whose input (Mamba: output) is one of transformers' own `hidden_states`, bit for bit.
- **identity**: hook points at which the clean activation spliced in gives the model's own logits, and zeros others.

A place that a family lacks, and any other module, can be named by its path: `module.model.layers.7.mlp.output`.

| family | blocks | places besides resid_pre, resid_post | next | sum | library | identity |
|---|---|---|---|---|---|---|
"""
_FAILED = """
## Families that do not work

| family | reason |
|---|---|
"""


def line(name: str) -> tuple[bool, str]:
    """Tell whether a family works, and return its line of the table."""
    from saeflow.sources.proof import prove

    try:
        model = tiny_family(name)
    except Exception as error:
        return (
            False,
            f"| {name} | transformers does not build it from its configuration: {_cell(error)} |",
        )
    try:
        proof = prove(model)
    except UserError as error:
        return False, f"| {name} | {_cell(error)} |"
    except Exception as error:
        return False, f"| {name} | it does not run on token ids alone: {_cell(error)} |"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(proof.kinds.items()))
    places = ", ".join(proof.places[1:-1]) or "none"
    return True, (
        f"| {name} | {kinds} | {places} | {proof.linked} | {proof.sums} | {proof.hidden_states} | {proof.identities} |"
    )


def _cell(error: Exception) -> str:
    return last_line(str(error)).replace("|", "\\|") or type(error).__name__


def page(names: Sequence[str]) -> str:
    """The page of some families."""
    import transformers

    found = [line(name) for name in names]
    works = "\n".join(text for does, text in found if does)
    fails = "\n".join(text for does, text in found if not does)
    version = ".".join(transformers.__version__.split(".")[:2])
    head = _HEAD.format(version=version, shown=len(names), all=len(FAMILIES))
    return head + works + "\n" + (_FAILED + fails + "\n" if fails else "")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    PAGE.write_text(page(sys.argv[1:] or FAMILIES), encoding="utf-8")
