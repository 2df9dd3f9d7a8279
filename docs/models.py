"""Write docs/models.md: families of causal language models of transformers with the proof of their hook points.

python -m docs.models           # all families, each in a process of its own
python -m docs.models gpt2 phi  # these families; the page keeps its lines of the others
"""

import logging
import multiprocessing
import re
import resource
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from docs.families import FAMILIES, tiny_family

from saeflow.errors import UserError
from saeflow.sources.hub import last_line
from saeflow.sources.proof import prove

PAGE = Path(__file__).with_name("models.md")
LIMIT_S, LIMIT_BYTES = 240, 8 << 30
"""Time and memory of one family."""
_HEAD = """# Models

saeflow finds the hook points of a causal language model in the model itself: it follows each block's output back through
sums to the block's input. No family has a line of code. This page is written by `python -m docs.models [FAMILY ...]`: it
builds every family that transformers {version} has for causal language models, at tiny size with random weights, and proves
its hook points. Before a model's first activation is stored, the same proof runs on that model. Of {all} families, {works}
work.

- **blocks**: what a block adds to the residual stream. Sequential: attention, then MLP; parallel: both at once; mixer:
  a state space, recurrence or convolution; attn + mlp + other: a third part beside both; other alone: an output that is no
  sum, so that it has `resid_pre` and `resid_post` alone.
- **places**: what `blocks.N.PLACE` can name. All families that work have `resid_pre` and `resid_post`.
- **next**: block outputs that are the next block's input, bit for bit.
- **sum**: blocks whose output is the sum of their input and of what their parts add. Where the model multiplies the stream
  by weights or norms of its own (Doge, Gemma 4, BERT), these are in the sum, and `attn_out` and `mlp_out` are what is added.
- **library**: blocks whose input (Mamba: output) is one of transformers' own `hidden_states`, bit for bit.
- **identity**: hook points at which the clean activation spliced in gives the model's own logits (so the cross-entropy is
  unchanged), and zeros others.

A place that a family lacks, and any other module, can be named by its path: `module.model.layers.7.mlp.output`.

Four kinds of models beside these are found and proved in the same way, each by tests at tiny size:

- **image towers** (`vision.blocks.N.PLACE`): CLIP, SigLIP, ViT, DINOv2 with and without registers (`tests/sources/test_towers.py`);
- **models of images and text** (`tests/sources/test_wrappers.py`): the language part and the tower of Gemma 3, LLaVA, Llama 4,
  Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with their own preprocessing. Rows of an image are what stands before its patches, then the
  patches row by row, whatever order the tower has them in (found on the tower itself). Qwen-VL's tower takes images of any size:
  `model.image_size` is the side of the square that each is brought to. Llama 4's processor cuts an image into tiles; here the
  tower sees each image whole, as the processor's global tile. What stands behind a tower's last block, such as Qwen-VL's
  merger, is no hook point: the tower's own output does not depend on it;
- **encoders**: BERT, DistilBERT, ModernBERT. They predict no next tokens: cross-entropy is not measured, and the tables and the
  report say why (`tests/evaluation/test_without_predictions.py`);
- **encoder-decoders of texts**: T5, BART and the families like it are run as their encoder alone, and the record says so. The
  decoder's activations depend on a second text, which a source of texts does not have.

| family | blocks | places besides resid_pre, resid_post | next | sum | library | identity |
|---|---|---|---|---|---|---|
"""
_FAILED = """
## Families that do not work

| family | reason |
|---|---|
"""
_LINE = re.compile(r"^\| ([\w.-]+) \|.*\|$", re.MULTILINE)


def line(name: str) -> str:
    """A family's line of the table: its proof, or the reason why there is none."""
    try:
        model = tiny_family(name)
    except Exception as error:
        return f"| {name} | transformers does not build it from a configuration alone: {_cell(error)} |"
    try:
        proof = prove(model)
    except UserError as error:
        return f"| {name} | {_cell(error)} |"
    except Exception as error:
        return f"| {name} | it does not run on token ids alone: {_cell(error)} |"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(proof.kinds.items()))
    places = ", ".join(proof.places[1:-1]) or "none"
    return f"| {name} | {kinds} | {places} | {proof.linked} | {proof.sums} | {proof.hidden_states} | {proof.identities} |"


def _cell(error: Exception) -> str:
    found = re.sub(r"\s+", " ", last_line(str(error))).replace("|", "\\|")
    return f"{found[:300]} ..." if len(found) > 300 else found or type(error).__name__


def _in_a_process(name: str, out: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    out.send(line(name))


def bounded_line(name: str) -> str:
    """`line` in a process of its own, with bounded time and memory."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_in_a_process, args=(name, there))
    process.start()
    there.close()
    try:
        return str(here.recv()) if here.poll(LIMIT_S) else f"| {name} | not done in {LIMIT_S} s |"
    except EOFError:
        return (
            f"| {name} | its process ended without an answer ({LIMIT_BYTES >> 30} GiB of memory) |"
        )
    finally:
        process.kill()
        process.join()


def lines_of(page: str) -> dict[str, str]:
    """The lines of a page by family."""
    return {found[1]: found[0] for found in _LINE.finditer(page) if found[1] in FAMILIES}


def page(lines: Sequence[str]) -> str:
    """The page of some lines."""
    works = [text for text in lines if text.count(" | ") == 6]
    fails = [text for text in lines if text not in works]
    version = ".".join(transformers.__version__.split(".")[:2])
    head = _HEAD.format(version=version, works=len(works), all=len(FAMILIES))
    return (
        head
        + "".join(f"{text}\n" for text in works)
        + (_FAILED + "".join(f"{text}\n" for text in fails) if fails else "")
    )


def main(names: Sequence[str]) -> None:
    """Prove some families and write their lines into the page."""
    for name in names:
        known = lines_of(PAGE.read_text(encoding="utf-8"))
        known[name] = bounded_line(name)
        PAGE.write_text(page([known[one] for one in FAMILIES if one in known]), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    main(sys.argv[1:] or FAMILIES)
